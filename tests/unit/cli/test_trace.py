"""What `torchways trace` says of what it wrote."""

from torchways.cli import trace
from torchways.cli.main import parser
from torchways.rpc import operator
from torchways.rpc.operator import ClusterTrace
from torchways.rpc.spans import FORGOTTEN, Span


def test_spans_that_are_gone_are_told(monkeypatch, tmp_path, capsys):
    kept = Span("f", "island 0 device 0", 40 * 10**9, 41 * 10**9, 7, kind="compute")
    gone = Span("more spans than are kept", FORGOTTEN, 0, 40 * 10**9, 0, kind=FORGOTTEN)
    collected = ClusterTrace({"executor i0.e1": [gone, kept], "client 1": []}, {})
    monkeypatch.setattr(operator, "ask", lambda access, question: collected)
    monkeypatch.setattr(trace, "access", lambda parsed: None)
    path = tmp_path / "trace.json"
    assert trace.run(parser().parse_args(["trace", "--seconds", "60", "-o", str(path)])) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: 1 spans of 1 executor, 0 schedulers and 1 client in 60 s")
    assert second == "without the first 40.0 s of executor i0.e1: it had more spans since than a process keeps"
