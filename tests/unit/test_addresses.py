"""Addresses as processes tell them to one another."""

import socket

import pytest

from torchways.addresses import address_of, family_of, host_and_port, is_wildcard
from torchways.config import ClusterConfig
from torchways.errors import ConfigError


@pytest.mark.parametrize(("host", "text"), [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("a.b", "a.b:7")])
def test_an_address_is_read_as_it_was_written(host, text):
    assert address_of(host, 7) == text
    assert host_and_port(text) == (host, 7)
    assert (family_of(host) == socket.AF_INET6) == (host == "::1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0:0::0", "0", "", "*"])
def test_a_cluster_does_not_listen_where_nobody_can_connect(host):
    assert is_wildcard(host)
    with pytest.raises(ConfigError, match="host must name an address of this machine that clients can reach, not"):
        ClusterConfig(host=host)
    assert not is_wildcard("10.0.0.1")
