import os
from pathlib import Path

import pytest

from tests.documents import data_config
from v4train.data.corpus import check_data
from v4train.data.problems import DataError
from v4train.data.sources import find_documents, split_position, stdlib_files
from v4train.errors import ConfigError


def text(path, fraction=0.2, on_error="skip"):
    """As conf/data/text.yaml has it."""
    return data_config(path=path, validation_fraction=fraction, on_error=on_error)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(documents):
    return [document.name for document in documents]


def everything(config):
    documents = find_documents(config)
    return sorted(names(documents.train) + names(documents.validation))


def test_stdlib_is_the_library_without_its_tests():
    files = stdlib_files(None)
    assert files["os.py"].read_bytes() == Path(os.__file__).read_bytes()
    assert {"json/decoder.py", "pydoc_data/topics.py", "encodings/cp1252.py", "unittest/case.py"} <= files.keys()
    parts = {part for name in files for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    assert not any("_sysconfigdata" in name for name in files)
    assert list(files) == sorted(files)
    assert 500 < len(files) < 900
    assert 8e6 < sum(path.stat().st_size for path in files.values()) < 20e6


def test_stdlib_split_shares_nothing_and_is_not_one_file():
    documents = find_documents(data_config(source="stdlib", validation_fraction=0.05, on_error="skip"))
    assert not {d.name for d in documents.train} & {d.name for d in documents.validation}
    assert not {d.read() for d in documents.train} & {d.read() for d in documents.validation}
    sizes = [d.stop for d in documents.validation]
    total = sum(sizes) + sum(d.stop for d in documents.train)
    assert 0.02 < len(sizes) / (len(sizes) + len(documents.train)) < 0.08
    assert 0.01 < sum(sizes) / total < 0.1
    assert max(sizes) < sum(sizes) / 2


def test_split_does_not_move_with_the_folder_or_with_other_documents(tmp_path):
    files = {f"part/{i}.txt": f"document {i}\n" for i in range(100)}
    first = find_documents(text(str(write(tmp_path / "a", files)), 0.3))
    moved = find_documents(text(str(write(tmp_path / "b", files)), 0.3))
    grown = find_documents(text(str(write(tmp_path / "c", files | {f"part/x{i}": f"{i}" for i in range(9)})), 0.3))
    assert 15 < len(first.validation) < 45
    assert names(first.validation) == names(moved.validation)
    assert set(names(first.validation)) <= set(names(grown.validation))
    assert set(names(first.train)) <= set(names(grown.train))
    assert first.fingerprint == moved.fingerprint != grown.fingerprint


def test_fingerprint_sees_content_name_and_split(tmp_path):
    files = {f"{i}.txt": f"document {i}\n" for i in range(20)}
    fingerprints = [
        find_documents(text(str(write(tmp_path / str(i), changed)), fraction)).fingerprint
        for i, (changed, fraction) in enumerate(
            [
                (files, 0.2),
                (files | {"3.txt": "document 4!\n"}, 0.2),
                ({name + "x": content for name, content in files.items()}, 0.2),
                (files, 0.7),
            ]
        )
    ]
    assert len(set(fingerprints)) == 4


def test_path_may_be_file_folder_glob_or_list(tmp_path, monkeypatch):
    root = write(tmp_path, {"a/1.txt": "1", "a/b/2.md": "2", "a/.git/3.txt": "3", "a/.4.txt": "4", "c/5.txt": "5"})
    assert everything(text(str(root / "a"))) == ["1.txt", "b/2.md"]
    assert everything(text(str(root / "**/*.txt"))) == ["a/1.txt", "c/5.txt"]
    assert everything(text([str(root / "c"), str(root / "*/b/*"), root / "c/5.txt"])) == ["a/b/2.md", "c/5.txt"]
    monkeypatch.chdir(root)
    assert everything(text(["a", "c/../c/5.txt"])) == ["a/1.txt", "a/b/2.md", "c/5.txt"]


def test_empty_binary_and_copied_files_are_left_out(tmp_path, caplog):
    root = write(tmp_path, {"a": "same", "b": "same", "c": "", "d": b"\x89PNG\0\0", "e": b"caf\xe9\r\n"})
    with caplog.at_level("INFO", "v4train"):
        documents = find_documents(text(str(root)))
    assert "left out 1 copies, 1 empty files, 1 binary files" in caplog.text
    assert {d.name: d.read() for d in documents.train + documents.validation} == {"a": "same", "e": "caf\ufffd\r\n"}


@pytest.mark.parametrize(
    ("content", "kind"), [("", "empty"), (b"\x89PNG\0\0", "undecodable"), (b"caf\xe9\r\n", "undecodable")]
)
def test_files_without_good_text_can_be_an_error(tmp_path, content, kind):
    root = write(tmp_path, {"a": "text", "sub/bad": content})
    with pytest.raises(DataError, match=f"data.on_error=error: sub/bad: {kind}"):
        find_documents(text(str(root), on_error="error"))


def test_neither_side_is_ever_empty(tmp_path):
    root = write(tmp_path, {f"{i}": f"{i}" for i in range(5)})
    order = sorted("01234", key=split_position)
    assert names(find_documents(text(str(root), 1e-9)).validation) == [order[0]]
    assert names(find_documents(text(str(root), 1 - 1e-9)).train) == [order[-1]]


def test_one_document_is_cut_at_a_line_boundary(tmp_path):
    content = "".join(f"line {i} \u00e9\n" for i in range(100))
    documents = find_documents(text(str(write(tmp_path, {"book.txt": content}) / "book.txt"), 0.1))
    (train,), (validation,) = documents.train, documents.validation
    assert train.read() + validation.read() == content
    assert train.read().endswith("\n")
    assert 0.08 < len(validation.read()) / len(content) < 0.12
    short = find_documents(text(str(write(tmp_path / "s", {"f": "a\n" + "b" * 99}))))
    assert (short.train[0].read(), short.validation[0].read()) == ("a\n", "b" * 99)


@pytest.mark.parametrize("content", ["one line", "one line\n"])
def test_one_line_can_not_be_split(tmp_path, content):
    with pytest.raises(ConfigError, match="data.path=.*one line"):
        find_documents(text(str(write(tmp_path, {"f": content}))))


@pytest.mark.parametrize("path", ["{}/nothing", "{}/*.txt", "", None, [], ["{}/there", "{}/nothing"], "{}/empty", 7])
def test_paths_that_match_nothing_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"there": "x"})
    (tmp_path / "empty").mkdir()
    path = [p.format(tmp_path) for p in path] if isinstance(path, list) else path and str(path).format(tmp_path)
    with pytest.raises(ConfigError, match="^data.path=.*no such file, folder or glob match") as error:
        check_data(text(path))
    assert "\n" not in str(error.value)


def test_files_without_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.path=.*no text"):
        find_documents(text(str(write(tmp_path, {"a": "", "b": b"\0"}))))
