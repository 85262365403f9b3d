"""How a program ends where a user can mend what is wrong."""

import pytest

from megatron.errors import UserError, run


@pytest.mark.parametrize("debug", [None, "1"])
def test_a_fault_is_one_line_and_a_traceback_only_where_it_is_asked_for(debug, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MEGATRON_DEBUG", raising=False)
    if debug:
        monkeypatch.setenv("MEGATRON_DEBUG", debug)

    def main() -> int:
        raise UserError("--lr x: expected a number")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: --lr x: expected a number"
    assert (len(lines) > 1) == bool(debug)
    if debug:
        assert lines[1].startswith("Traceback") and lines[-1].endswith("UserError: --lr x: expected a number")
