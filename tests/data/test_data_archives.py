"""Files in archives, and JSON files that are one list."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import pytest

from train.data.prepared.prepare import DataConfig, fingerprint
from train.data.sources.records import Rejects
from train.data.sources.source import documents, identity
from train.data.sources.source_config import FilesSource
from transformer.errors import UserError

FILES = {
    "news/sport/1.txt": "a goal", "news/sport/2.txt": "a match", "news/tech/1.txt": "a chip",
    "news/rows.jsonl": '{"text": "row"}\n', "__MACOSX/news/sport/._1.txt": "hidden", "news/.DS_Store": "hidden",
}  # fmt: skip
NAMES = ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "A.ZIP")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


def pack(path, files):
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, text in files.items():
                packed.writestr(name, text)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(text.encode()), 1_000_000
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def read(path, **settings):
    return list(documents(FilesSource(path=str(path), **settings)))


@pytest.mark.parametrize("name", NAMES)
def test_files_in_an_archive_are_read(tmp_path, name):
    archive = pack(tmp_path / name, FILES)
    assert [one.text for one in read(archive)] == ["row", "a goal", "a match", "a chip"]
    chosen = read(archive / "news" / "*" / "*.txt", label_field="folder")
    assert [(one.label, one.text) for one in chosen] == [("sport", "a goal"), ("sport", "a match"), ("tech", "a chip")]
    assert chosen[0].id.startswith(f"{name}/") and chosen[0].id.endswith("sport/1.txt")
    assert [one.text for one in read(archive / "news" / "rows.jsonl")] == ["row"]


def test_another_archive_of_the_same_name_is_other_data(tmp_path):
    config = FilesSource(path=str(pack(tmp_path / "a.zip", FILES)))
    before, same = identity(config), fingerprint(DataConfig(sources=(config,)))
    assert identity(config) == before and fingerprint(DataConfig(sources=(config,))) == same
    pack(tmp_path / "a.zip", FILES | {"news/tech/2.txt": "a phone"})
    assert identity(config) != before
    assert [one.text for one in read(config.path)][-1] == "a phone"


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
@pytest.mark.parametrize("archive", ["a.zip", "a.tar"])
def test_a_name_that_leads_out_is_refused(tmp_path, archive, name):
    with pytest.raises(UserError, match=r"names the file .*, which is not inside its folder"):
        read(pack(tmp_path / archive, {"in.txt": "in", name: "out"}))
    assert not list(tmp_path.rglob("out.txt")) and not list(tmp_path.rglob("in.txt"))


def test_folders_in_an_archive_are_classes_at_its_root_too(tmp_path):
    archive = pack(tmp_path / "a.zip", {"1.txt": "at the root", "b/2.txt": "below"})
    assert sorted((one.label, one.text) for one in read(archive, label_field="folder")) == [
        ("a.zip", "at the root"), ("b", "below"),
    ]  # fmt: skip


def test_second_names_of_a_file_are_read(tmp_path):
    with tarfile.open(pack(tmp_path / "a.tar", {"a/x.txt": "text"}), "a") as tar:
        member = tarfile.TarInfo("b/y.txt")
        member.type, member.linkname, member.mtime = tarfile.LNKTYPE, "a/x.txt", 1e30
        tar.addfile(member)
    assert [one.text for one in read(tmp_path / "a.tar")] == ["text", "text"]


def test_links_in_a_zip_are_not_texts(tmp_path):
    link = zipfile.ZipInfo("b.txt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(pack(tmp_path / "a.zip", {"a.txt": "text"}), "a") as packed:
        packed.writestr(link, "../a.txt")
    assert [one.text for one in read(tmp_path / "a.zip")] == ["text"]


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("link.txt")
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
        tar.addfile(member)
    with pytest.raises(UserError, match=r"a\.tar: no such file"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_a_damaged_archive_is_one_line(tmp_path, name):
    archive = pack(tmp_path / name, {f"{number}.txt": f"text {number} " * 400 for number in range(20)})
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", whole[:40] + bytes(200) + whole[240:]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read(archive)
        assert str(archive) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_in_the_archive_is_named_as_it_was_given(tmp_path):
    archive = pack(tmp_path / "a.zip", FILES)
    for inside, said in (("none/*.txt", "no such file"), ("news", "this is a folder")):
        with pytest.raises(UserError, match=rf"a\.zip/{inside.replace('*', '[*]')}: {said}"):
            read(archive / inside)


LISTS = {
    "plain": '[{"text": "one"}, {"text": "two"}]',
    "indented": json.dumps([{"text": "one", "more": [1, {"a": []}]}, {"text": "two"}], indent=4),
    "windows": '[\r\n  {"text": "one"},\r\n  {"text": "two"}\r\n]\r\n',
    "lines": '{"text": "one"}\n{"text": "two"}\n',
    "marked": '\ufeff[{"text": "one"},{"text": "two"}]',
}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_json_file_is_a_list_or_lines(tmp_path, monkeypatch, content, chunk):
    monkeypatch.setattr("train.data.sources.json_items._CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(content.encode())
    assert [one.text for one in read(tmp_path / "a.json")] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ('[{"text": "one"},\n {"text": }]', 2, "malformed JSON (Expecting value)"),
        ('[{"text": "one"},\n {"text": "two"}', 2, "expected a comma or the end of the list, got the end of the file"),
        ('[{"text": "one"},\n', 2, "the list does not end"),
        ('[{"text": "one"}\n {"text": "two"}]', 2, "expected a comma or the end of the list"),
        ('[{"text": "one"}]\n\n[]', 3, "after the list there is"),
        ('[{"text": "one"},\n\n3]', 3, "expected a JSON object, got"),
        ("[" * 100_000, 1, "malformed JSON"),
    ],
)
def test_a_malformed_list_names_the_line(tmp_path, content, line, expected):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and expected in str(caught.value)
    rejects = Rejects("skip")
    found = list(documents(FilesSource(path=str(path), on_error="skip"), rejects))
    assert [one.text for one in found] == [word for word in ("one", "two") if f'"{word}"}}' in content][: len(found)]
    assert bool(found) == content.startswith('[{"text": "one"}') and rejects.count == 1
