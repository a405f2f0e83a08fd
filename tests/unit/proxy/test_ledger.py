"""Whose servers are: the ledger's text and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.ipvs import ServerId
from netpol.model.net import Family
from proxy import ledger_file
from proxy.ledger import HEADER, Ledger, Word, line, parse, text
from proxy.ledger_file import LedgerError, LedgerFile
from proxy.marks import MarkKey
from tests.proxynode import id_of

WEB, DNS, WEB6 = id_of("10.96.0.1"), id_of("10.96.0.2", 53, Protocol.UDP), id_of("fd00:96::1")
MARK = ServerId.by_mark(Family.V6, 0x100)
OWNER = MarkKey(ObjectKey("ns", "web"), "http", Family.V6, 2)


def test_what_is_written_is_read():
    ledger = Ledger({WEB: None, WEB6: None, MARK: OWNER}, {DNS})
    assert parse(text(ledger)) == ledger
    assert ledger.marks == {OWNER: 0x100}
    assert len(ledger) == 4


def test_a_later_line_supersedes_the_earlier_ones():
    lines = [line(Word.OURS, WEB), line(Word.FOREIGN, WEB), line(Word.OURS, DNS)]
    lines += [line(Word.GONE, DNS), line(Word.FOREIGN, WEB6), line(Word.OURS, WEB6)]
    assert parse(HEADER + b"".join(lines)) == Ledger({WEB6: None}, {WEB})


def test_a_last_line_without_its_end_was_never_acted_on():
    whole = HEADER + line(Word.OURS, WEB)
    torn = line(Word.OURS, DNS)
    for length in range(len(torn)):
        assert parse(whole + torn[:length]) == Ledger({WEB: None}, set())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"netpol-ipvs-ledger 2\n",
        HEADER[:-1],
        HEADER + b"nonsense\n" + line(Word.OURS, WEB),
        HEADER + b'["?",4,"TCP","10.96.0.1",80]\n',
        HEADER + b'["+",6,"TCP","10.96.0.1",80]\n',
        HEADER + b'["+",4,"XTP","10.96.0.1",80]\n',
        HEADER + b'["+",4,"TCP","10.96.0.1",80000]\n',
        HEADER + b'["+",4,0]\n',
        HEADER + b'["+",4,256,"ns"]\n',
        HEADER + b"7\n",
        HEADER + b"\xff\xfe\n",
    ],
)
def test_what_cannot_be_believed_is_refused_as_a_whole(data: bytes):
    with pytest.raises(ValueError, match="ledger"):
        parse(data)


def file_at(path: Path) -> LedgerFile:
    file = LedgerFile(path)
    file.load()
    return file


def test_facts_are_on_disk_when_say_returns_and_survive(tmp_path: Path):
    path = tmp_path / "run" / "ipvs.ledger"
    first = file_at(path)
    assert not first.fault
    first.say([(Word.OURS, WEB, None), (Word.OURS, MARK, OWNER)])
    first.say([(Word.FOREIGN, DNS, None), (Word.OURS, WEB, None)])
    assert parse(path.read_bytes()) == first.ledger
    second = file_at(path)
    assert second.ledger == Ledger({WEB: None, MARK: OWNER}, {DNS})
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    first.close()
    second.close()


def test_what_is_known_costs_no_write(tmp_path: Path):
    file = file_at(tmp_path / "ledger")
    file.say([(Word.OURS, WEB, None)])
    size = (tmp_path / "ledger").stat().st_size
    file.say([(Word.OURS, WEB, None), (Word.GONE, DNS, None)])
    assert (tmp_path / "ledger").stat().st_size == size
    file.close()


def test_an_unreadable_ledger_is_a_fault_and_begins_anew(tmp_path: Path):
    path = tmp_path / "ledger"
    path.write_bytes(b"nonsense\n")
    file = file_at(path)
    assert "only servers on our own link count as ours" in file.fault
    assert parse(path.read_bytes()) == Ledger()
    file.close()


def test_lines_of_the_past_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger_file, "COMPACT_BYTES", 1000)
    path = tmp_path / "ledger"
    file = file_at(path)
    file.say([(Word.OURS, DNS, None)])
    for _ in range(100):
        file.say([(Word.OURS, WEB, None)])
        file.say([(Word.GONE, WEB, None)])
    assert path.stat().st_size <= 1000
    assert parse(path.read_bytes()) == Ledger({DNS: None}, set())
    file.close()


def test_a_folder_that_cannot_be_written_is_an_error_until_it_can(tmp_path: Path):
    folder = tmp_path / "run"
    folder.write_text("in the way")
    file = LedgerFile(folder / "ledger")
    with pytest.raises(LedgerError, match="writing"):
        file.load()
    with pytest.raises(LedgerError):
        file.say([(Word.OURS, WEB, None)])
    folder.unlink()
    file.say([(Word.OURS, WEB, None)])  # known in memory, and still not on disk
    assert parse((folder / "ledger").read_bytes()) == Ledger({WEB: None}, set())
    file.close()
