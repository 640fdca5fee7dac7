import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployments.batch.manifest import Manifest, ManifestFailed, Problem, Variation
from deployments.batch.run_folder import Row
from deployments.schemas.endpoint import ENDPOINTS

CLIP, VIDEO = ENDPOINTS["fal-ai/animatediff-sparsectrl-lcm"], ENDPOINTS["fal-ai/controlnext"]


def rows_of(path: Path, text: str | bytes, overrides: tuple[str, ...] = (), sweeps: tuple[str, ...] = ()) -> list[Row | Problem]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(Manifest(str(path), CLIP, Variation.parsed(overrides, sweeps)).rows())


def test_the_three_formats_make_the_same_rows(tmp_path: Path):
    """CSV has text only, whose types are the endpoint's."""
    given = [{"id": "a", "prompt": "a cat, asleep", "seed": 3, "num_inference_steps": 2}, {"id": "b", "prompt": "ein Hund\n"}]
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(given), table)
    csv = '\ufeffid,prompt,seed,num_inference_steps\r\na,"a cat, asleep",3,2\r\nb,"ein Hund\n",,\r\n'
    made = [
        rows_of(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, given)) + "\n\n"),
        rows_of(tmp_path / "rows.CSV", csv),
        list(Manifest(str(table), CLIP).rows()),
    ]
    for rows in made:
        first, second = rows
        assert isinstance(first, Row)
        assert (first.id, first.number, first.input["seed"], first.input["num_inference_steps"]) == ("a", 1, 3, 2)
        assert isinstance(second, Row)
        assert second.input["prompt"] == "ein Hund\n"
        assert second.input["seed"] >= 0  # drawn
        assert second.input["num_inference_steps"] == 4


def test_every_problem_is_told_with_its_row(tmp_path: Path):
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": ',
        '["no", "object"]',
        '"text"',
        '{"prompt": "x", "num_inference_step": 3}',
        '{"prompt": "x", "num_inference_steps": "many"}',
        '{"prompt": "x", "id": "../up"}',
        '{"prompt": "x", "keyframe_0_image_url": "gone.png", "keyframe_0_index": 0}',
        '{"prompt": "x", "id": 7}',
        '{"prompt": "y", "id": "7"}',
        "[" * 100_000,
    ]
    found = rows_of(tmp_path / "rows.jsonl", "\n".join(lines))
    problems = {each.number: each.message for each in found if isinstance(each, Problem)}
    assert [row.id for row in found if isinstance(row, Row)] == ["000001", "7"]
    expected = {
        2: "not JSON",
        3: "no JSON object",
        4: "no JSON object",
        5: "num_inference_step: Extra inputs are not permitted",
        6: "num_inference_steps: Input should be a valid integer",
        7: "cannot name a file",
        8: "keyframe_0_image_url: gone.png cannot be read: there is no such file",
        10: "7 is an id of row 9 as well",
        11: "not JSON",
    }
    assert problems.keys() == expected.keys()
    for number, message in expected.items():
        assert message in problems[number]


def test_a_row_of_a_table_with_too_many_cells_is_a_problem(tmp_path: Path):
    assert rows_of(tmp_path / "rows.csv", "prompt\na,b\n") == [Problem(1, "it has more cells than the header")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"", "must end in .jsonl, .csv or .parquet"),
        ("rows.parquet", b"no table", "cannot be read"),
        ("rows.csv", b"prompt\n\xff\xfe\n", "cannot be read"),
    ],
)
def test_what_is_no_manifest_is_told(name: str, content: bytes, message: str, tmp_path: Path):
    with pytest.raises(ManifestFailed, match=message):
        rows_of(tmp_path / name, content)


def test_a_manifest_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(ManifestFailed, match="there is no such file"):
        list(Manifest(str(tmp_path / "rows.jsonl"), CLIP).rows())


def test_overrides_hold_for_all_rows_and_sweeps_multiply_them(tmp_path: Path):
    text = '{"id": "a", "prompt": "x", "num_inference_steps": 9}\n{"id": "b", "prompt": "x"}'
    rows = rows_of(tmp_path / "rows.jsonl", text, ("num_inference_steps=2",), ("seed=0..2", "prompt=a cat,dog"))
    found = [(row.id, row.number, row.input["prompt"]) for row in rows if isinstance(row, Row)]
    assert len(found) == 12
    assert found[:3] == [("a-seed-0-prompt-1", 1, "a cat"), ("a-seed-0-prompt-dog", 1, "dog"), ("a-seed-1-prompt-1", 1, "a cat")]
    assert {row.input["num_inference_steps"] for row in rows if isinstance(row, Row)} == {2}


@pytest.mark.parametrize(
    ("overrides", "sweeps", "message"),
    [
        (("steps=2",), (), "has no steps; it has"),
        (("seed",), (), "'seed' is not field=value"),
        ((), ("seed=9..0",), "must go up"),
        ((), ("seed=0..99999999",), "at most 1,000,000 values"),
    ],
)
def test_a_variation_that_makes_no_sense_is_told(
    overrides: tuple[str, ...], sweeps: tuple[str, ...], message: str, tmp_path: Path
):
    with pytest.raises(ManifestFailed, match=message):
        rows_of(tmp_path / "rows.jsonl", '{"prompt": "x"}', overrides, sweeps)


def test_files_beside_the_manifest_are_known_by_their_content(tmp_path: Path):
    """Not by their names: a picture that has changed makes another row."""
    (tmp_path / "media").mkdir()
    for name, data in (("a.png", b"one"), ("b.png", b"one"), ("c.mp4", b"two")):
        (tmp_path / "media" / name).write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(b"x").decode()
    lines = [
        {"id": "1", "image_url": "media/a.png", "video_url": "media/c.mp4", "seed": 1},
        {"id": "2", "image_url": str(tmp_path / "media/b.png"), "video_url": f"file://{tmp_path}/media/c.mp4"},
        {"id": "3", "image_url": uri, "video_url": "https://example.com/v.mp4"},
    ]
    path = tmp_path / "rows.jsonl"

    def made() -> tuple[Manifest, list[Row]]:
        path.write_text("\n".join(map(json.dumps, lines)))
        manifest = Manifest(str(path), VIDEO)
        return manifest, [row for row in manifest.rows() if isinstance(row, Row)]

    manifest, rows = made()
    one, two = rows[0].input["image_url"], rows[0].input["video_url"]
    assert one != two
    assert (rows[1].input["image_url"], rows[1].input["video_url"]) == (one, two)
    assert (rows[2].input["image_url"], rows[2].input["video_url"]) == (uri, "https://example.com/v.mp4")
    assert {f"kept:{name}" for name in manifest.files} == {one, two}
    assert made()[1][0] == rows[0]
    (tmp_path / "media" / "a.png").write_bytes(b"three")
    assert made()[1][0].digest != rows[0].digest
    assert made()[1][1].digest == rows[1].digest
