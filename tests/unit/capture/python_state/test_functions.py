"""What a function's bytecode names, in every Python that is supported: their instructions differ."""

from torchways.capture.python_state.functions import reads_of, unread_parameters

log, scale = [], 2.0


class Base:
    def forward(self, x):
        return x


class Derived(Base):
    def forward(self, x):
        self.seen.append(x)
        return super().forward(x) * self.factor

    def ignores_itself(self, x):
        return x


def two_arguments(x, y, unused):
    return x + y


def only_adds(x):
    log.append(x)
    return x * scale


def copies(x, y):
    z = x
    return z, y


def perhaps_unbound(x):
    if x:
        found = x
    return found


def closes_over(x, y):
    return (lambda: x), [item for item in y]


def test_parameters_that_are_read_together_are_read():
    assert unread_parameters(two_arguments) == {"unused"}
    assert unread_parameters(copies) == set()
    assert unread_parameters(closes_over) == set()
    assert unread_parameters(Derived().ignores_itself) == set()
    assert unread_parameters(Derived.ignores_itself) == {"self"}
    assert {"x", "found"} <= reads_of(perhaps_unbound.__code__).locals


def test_what_is_only_appended_to_is_not_read():
    reads = reads_of(only_adds.__code__)
    assert reads.variables == {"log", "scale"}
    assert reads.only_added_to == {"log"}
    assert {"scale", "x"} <= reads.all_loads
    assert "seen" in reads_of(Derived.forward.__code__).only_added_to


def test_attributes_of_super_are_named():
    assert {"forward", "factor", "seen", "append"} <= reads_of(Derived.forward.__code__).attributes
