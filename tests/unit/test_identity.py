"""Who calls: no secret but the right one proves a role, and nobody names what is another's."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchways.errors import AccessDenied, ConfigError
from torchways.ids import client_range
from torchways.rpc import identity
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import METHODS, Caller, ClusterKey, Role

KEY = ClusterKey(bytes(32))


def test_a_secret_proves_one_role_of_one_client():
    one = Caller(Role.CLIENT, 1)
    secret = KEY.secret_of(one)
    assert KEY.identify(f"client:1:{secret}") == one
    for text in (f"client:2:{secret}", f"scheduler:1:{secret}", f"client:01:{secret[:-1]}", "client:1:", "", "client"):
        assert KEY.identify(text) is None
    assert ClusterKey(bytes(31) + b"1").identify(f"client:1:{secret}") is None
    assert KEY.identify(f"newcomer:0:{KEY.secret_of(Caller(Role.NEWCOMER))}") is None


@given(st.text(max_size=200))
def test_no_text_is_believed_or_raises(text):
    assert KEY.identify(text) is None


def test_every_method_has_its_callers_and_clients_have_no_part_in_the_clusters_own():
    services = pb.DESCRIPTOR.services_by_name.values()
    methods = {f"{service.name}/{method.name}" for service in services for method in service.methods}
    assert methods == set(METHODS)
    client = Caller(Role.CLIENT, 1)
    mine = {name for name in methods if identity.may_call(client, f"/torchways.v1.{name}")}
    assert "Scheduler/Connect" in mine
    assert not mine & {
        "ResourceManager/JoinNode",
        "Scheduler/AddSlice",
        "Scheduler/RemoveSlice",
        "Scheduler/RemoveExecutor",
        "Executor/Control",
    }
    assert not identity.may_call(client, "/torchways.v1.Executor/Another")


def test_a_client_names_its_own():
    first, end = client_range(1)
    owners = {5: 1, 6: 2}
    identity.check_owner(1, ids=[first, end - 1], slices=[5, 7], owners=owners)  # 7 is gone: nothing can be done to it
    for wrong in ({"ids": [end]}, {"ids": [3]}, {"slices": [6]}):
        with pytest.raises(AccessDenied, match="which is not its own"):
            identity.check_owner(1, **wrong, owners=owners)


def test_the_key_leaves_the_environment_with_its_reader(monkeypatch):
    key = identity.new_cluster_key()
    assert key.hex() not in repr(key)
    monkeypatch.setenv(identity.CLUSTER_KEY_VARIABLE, key.hex())
    assert identity.take_cluster_key().hex() == key.hex()
    assert identity.CLUSTER_KEY_VARIABLE not in os.environ
    for text in ("", "abc", "no hex", key.hex()[2:]):
        monkeypatch.setenv(identity.CLUSTER_KEY_VARIABLE, text)
        with pytest.raises(ConfigError, match="TORCHWAYS_CLUSTER_KEY must be 64 hexadecimal digits"):
            identity.take_cluster_key()
