"""Bundles have the same bytes each time, and members other than the known ones are refused."""

import io
import warnings
import zipfile

import pytest

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import bundle
from imgclf_jax.run.record import Record

CONTENTS = {"config.json": b"{}", "metrics.jsonl": b'{"step": 1}\n', "result.json": b"{}"}


def test_the_same_contents_give_the_same_bytes(tmp_path):
    """Whatever the order and the time; other tools can read it."""
    bundle.write(tmp_path / "a.zip", CONTENTS)
    bundle.write(tmp_path / "b.zip", dict(reversed(CONTENTS.items())))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == CONTENTS
        assert {member.date_time for member in packed.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert bundle.read(tmp_path / "a.zip") == CONTENTS


def packed(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file, warnings.catch_warnings(action="ignore"):  # of duplicate names
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "says"), [
    (b"hello", "not a zip"),
    (packed([*CONTENTS.items(), ("../evil", b"x")]), "'../evil'"),
    (packed([*CONTENTS.items(), ("config.json", b"[]")]), "but a bundle holds"),
    (packed([("result.json", b"{}")]), "but a bundle holds"),
    (packed(list(CONTENTS.items())).replace(b'{"step": 1}', b'{"step": 2}'), "CRC"),
])  # fmt: skip
def test_what_is_no_bundle_is_refused(tmp_path, content, says):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="is not a readable bundle") as caught:
        bundle.read(tmp_path / "a.zip")
    assert says in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_member_that_is_damaged(tmp_path):
    whole = configs.to_json(configs.default_config()).encode()
    members = {"config.json": whole, "provenance.json": b"[1]", "digests.jsonl": b'{"step": "x"}\n' + b"[" * 100_000}
    bundle.write(tmp_path / "a.zip", members)
    record = Record.load(str(tmp_path / "a.zip"))
    assert record.config.seed == 0
    assert record.result == {}
    with pytest.raises(UserError, match=r"digests.jsonl of .*a.zip is damaged"):
        _ = record.digests
    with pytest.raises(UserError, match=r"provenance.json of .*a.zip is damaged"):
        _ = record.provenance
    bundle.write(tmp_path / "b.zip", {"config.json": b'{"sed": 1}'})
    with pytest.raises(UserError, match=r"config.json of .*b.zip"):
        _ = Record.load(str(tmp_path / "b.zip")).config
