"""README.md and its neighbours: the map, links, Python blocks, result tables, words that must not appear."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CARD.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/transformers.md")
README = (ROOT / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------
# the map


def map_entries() -> list[str]:
    """Paths of README's map; an indented line is a path in the last folder that is not indented."""
    block = re.search(r"^## Map\n+```text\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert block, "README has no map"
    entries, folder = [], ""
    for line in block[1].splitlines():
        match = re.fullmatch(r"( {2})?(\S+) +\S.*", line)
        assert match, f"not a line of the map: {line!r}"
        if match[1] is None:
            folder = match[2]
        entries.append(match[2] if match[1] is None else folder + match[2])
    return entries


def git(*words: str) -> str:
    """Output of a git command on this checkout; skips where there is no git or no checkout of our own."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode != 0:
        pytest.skip(f"not a git checkout: {' '.join(done.stderr.split())}")
    return done.stdout


def test_map_names_every_tracked_entry():
    if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != ROOT:
        pytest.skip("this folder lies in the git checkout of something else")
    tracked = {path.partition("/")[0] for path in git("ls-files").splitlines()}
    on_map = {entry.partition("/")[0] for entry in map_entries()}
    assert tracked <= on_map, f"missing on the map: {sorted(tracked - on_map)}"


def test_map_names_nothing_else():
    entries = map_entries()
    assert len(entries) == len(set(entries))
    for entry in entries:
        found = (ROOT / entry).is_dir() if entry.endswith("/") else (ROOT / entry).is_file()
        assert found, f"{entry} is on the map but not there"


def headings(document: Path) -> set[str]:
    """What links to headings of a document end in."""
    lines = document.read_text().splitlines()
    titles = (line.lstrip("# ") for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "document", sorted({*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))})
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{target} does not exist"
        assert not heading or heading in headings(path), f"no heading for {target}"


# ----------------------------------------------------------------------------------------------------
# Python blocks


class Block(NamedTuple):
    document: str
    line: int  # of the first line of code
    gpu: bool
    code: str


def python_blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    pattern = re.compile(r"^(<!-- code: gpu -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Block(document, text.count("\n", 0, match.start(2)) + 1, match[1] is not None, match[2])
        for match in pattern.finditer(text)
    ]


BLOCKS = [block for document in DOCUMENTS for block in python_blocks(document)]


def block_id(block: Block) -> str:
    return f"{block.document}:{block.line}"


def run_block(block: Block) -> None:
    """Run in a namespace of its own; tracebacks name the document and its lines."""
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / block.document), "exec")
    exec(code, {"__name__": "__main__"})


def test_every_marker_stands_on_a_block():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        marked = sum(block.gpu for block in BLOCKS if block.document == document)
        assert len(re.findall(r"^<!-- code: ", text, re.MULTILINE)) == marked
        fences = re.findall(r"^```python$", text, re.MULTILINE)
        assert len(fences) == sum(block.document == document for block in BLOCKS)


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.gpu], ids=block_id)
def test_block_runs_on_the_cpu(block, monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    if "transformers" in block.code:
        pytest.importorskip("transformers")
    run_block(block)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.gpu], ids=block_id)
def test_block_runs_on_a_gpu(block, cuda_variant_dir, kernel_package, monkeypatch):
    """With the built kernel: for real, or without a GPU on fake tensors, which have shapes and no numbers."""
    monkeypatch.setenv("LOCAL_KERNELS", f"org/flash-kda={cuda_variant_dir}")
    if torch.cuda.is_available():
        run_block(block)
        torch.cuda.synchronize()
        return
    monkeypatch.setattr(sys.modules[kernel_package.chunk_kda.__module__], "_sm_major", lambda device: 9)
    with FakeTensorMode():
        run_block(block)


# ----------------------------------------------------------------------------------------------------
# words

FORBIDDEN = {
    "a path of one machine": r"(?<![\w.$])/(work|root|home|tmp|mnt)(/|\b)",
    "a package registry's host": r"\b(pypi|pythonhosted|anaconda|npmjs|crates)\.(org|io|com)\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_forbidden_words(document, what):
    found = re.search(FORBIDDEN[what], (ROOT / document).read_text())
    assert found is None, f"{document} names {what}: {found[0]!r}"


# ----------------------------------------------------------------------------------------------------
# result tables


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_readme_is_what_the_results_say():
    command = [sys.executable, ROOT / "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ENVIRONMENT = {
    "device": "NVIDIA Test 9000",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "triton": None,
    "kernels": "0.17.2",
    "flash-linear-attention": "0.6.0",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
}


def timing(ms: float) -> dict:
    return {"median_ms": ms, "p10_ms": 0.9 * ms, "p90_ms": 1.1 * ms, "repeats": 20}


def decode_results() -> dict:
    """A result file as benchmarks/decode.py writes it."""
    row = {"case": "32x32", "T": 1, "state": "fp32", "floor_ms": 0.0447, "over_floor": 1.074}
    row |= {"ours": {"graph": timing(0.048)}, "fla": {"graph": timing(0.0577)}, "speedup_over_fla": 1.202}
    other = {"case": "64x64", "T": 4, "state": "bf16", "floor_ms": 0.09, "over_floor": 1.2}
    other |= {"ours": {"graph": timing(0.108)}}
    fused = {"case": "32x32", "fused": timing(0.0504), "bare": timing(0.048), "over_bare": 1.05}
    host = {"fused_recurrent_kda": timing(0.0132), "FLA": timing(0.061)}
    section = {"environment": ENVIRONMENT, "copy_bytes_per_s": 3.01e12, "host": host, "rows": [row, other]}
    return {"decode": section | {"fused": fused}}


def results() -> dict:
    """A result file as benchmarks/errors.py and benchmarks/prefill.py write it."""
    long = {"case": "8192/H96", "gate": "strong", "floor_ms": 0.34, "over_floor": 2.94}
    long |= {"ours": {"eager": timing(1.0)}, "fla": {"eager": timing(3.5)}, "speedup_over_fla": 3.5}
    short = {"case": "512/H32", "gate": "weak", "floor_ms": 0.0081, "over_floor": 7.41}
    short |= {"ours": {"eager": timing(0.06), "graph": timing(0.0512)}}
    errors = {"gate": "zero", "T": 1024, "H": 8, "ours": {"o": 3.61e-3, "final_state": 2.9e-3}}
    errors |= {"fla": {"o": None, "final_state": 8.0e-3}}
    return {
        "errors": {"environment": ENVIRONMENT, "rows": [errors]},
        "prefill": {
            "environment": ENVIRONMENT,
            "copy_bytes_per_s": 3.01e12,
            "host": {"chunk_kda": timing(0.021), "fwd": timing(0.012)},
            "rows": [long, short],
        },
    }


@pytest.fixture
def page(tmp_path, tables):
    """A README with empty sections beside a folder of results; calls tables.py on them."""
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text(
        "# Title\n\n<!-- results:errors -->\n<!-- /results -->\n\ntext\n\n"
        "<!-- results:prefill -->\nold\n<!-- /results -->\n\n"
        "<!-- results:decode -->\n<!-- /results -->\n\n"
        "<!-- results:layer -->\n<!-- /results -->\n\nend\n"
    )

    class Page:
        text = property(lambda self: readme.read_text())

        def write(self, text):
            readme.write_text(text)

        def add(self, name, content):
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

        def run(self, *options):
            return tables.main(["--readme", str(readme), "--results", str(folder), *options])

    return Page()


def rows_of(text: str) -> list[list[str]]:
    """Cells of every table row in `text`, headers and rules included."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_tables_hold_the_results(page):
    page.add("prefill-test.json", results())
    assert page.run() == 0
    errors, prefill = page.text.split("\ntext\n")
    row = ["zero", "1024", "8", "3.6e-03", "2.9e-03", "not finite", "8.0e-03"]
    assert rows_of(errors)[2:] == [row]
    assert rows_of(prefill)[2:] == [
        ["8192/H96", "strong", "1.000", "0.900..1.100", "0.340", "2.94", "3.500", "3.50", ""],
        ["512/H32", "weak", "0.0600", "0.0540..0.0660", "0.0081", "7.41", "", "", "0.0512"],
    ]
    for part in (errors, prefill):
        assert len({len(row) for row in rows_of(part)}) == 1, "rows of different width"
        assert "NVIDIA Test 9000; torch 2.11.0+cu130, cuda 13.0, kernels 0.17.2, " in part
        assert "flash-linear-attention 0.6.0; commit `0123456789ab-dirty`." in part
    assert "`python benchmarks/errors.py --lengths 1024 --heads 8`" in errors
    assert (
        "`python benchmarks/prefill.py --cases 8192/H96 512/H32 --gates strong weak --fla 8192/H96`"
        in prefill
    )
    assert "3.01 TB/s" in prefill and "`chunk_kda` 21, `fwd` 12" in prefill
    assert "old" not in prefill and prefill.endswith("<!-- /results -->\n\nend\n")


def test_the_table_of_decoding(page, tables):
    page.add("decode-test.json", decode_results())
    assert page.run() == 0
    table = page.text.split("results:decode")[1]
    assert rows_of(table)[2:] == [
        ["32x32", "1", "fp32", "0.0480", "0.0432..0.0528", "0.0447", "1.07", "0.0577", "1.20"],
        ["64x64", "4", "bf16", "0.108", "0.0972..0.119", "0.0900", "1.20", "", ""],
    ]
    assert "`python benchmarks/decode.py --cases 32x32 64x64`" in table
    assert "3.01 TB/s" in table and "microseconds: fused_recurrent_kda 13, FLA 61." in table
    assert "Fused step at 32x32, fp32 state: 0.0504 ms, 1.05 of the bare one's 0.0480." in table
    content = decode_results()
    del content["decode"]["fused"], content["decode"]["rows"][0]["fla"]
    content["decode"]["rows"].pop()
    page.add("decode-test.json", content)
    assert page.run() == 0
    table = page.text.split("results:decode")[1]
    assert "Fused" not in table and "FLA ms" not in table
    assert "`python benchmarks/decode.py --cases 32x32 --states fp32 --tokens 1 --no-fla`" in table
    rows = [
        {"case": c.name, "T": T, "state": s, "fla": {}}
        for c in tables.DECODE_CASES
        for s in ("fp32", "bf16")
        for T in (1, 4)
    ]
    assert tables.decode_command(rows) == "python benchmarks/decode.py"


def layer_results() -> dict:
    """A result file as benchmarks/layer.py writes it."""

    def row(name: str, ms: float) -> dict:
        facts = {"peak_bytes": 3 * 2**20, "launches": 24, "product_share": 1 / ms, "over_floor": 10 * ms}
        return {"name": name, "time": timing(ms)} | facts

    def part(title: str, *rows: dict) -> dict:
        return {"title": title, "floor_ms": 0.1, "products": timing(1.0), "rows": list(rows)}

    prefill = part(
        "prefill, 8192 tokens", row("ours", 2.0), row("fla", 7.0), {"name": "torch", "out_of_memory": True}
    )
    operator = {"name": "chunk_kda", "floor_ms": 0.11, "time": timing(0.22), "over_floor": 2.0}
    section = {"environment": ENVIRONMENT, "copy_bytes_per_s": 3.01e12, "tokens": 8192, "sequences": 32}
    section |= {"operators": [operator], "errors": {"ours": 5.6e-3, "fla": 6.9e-3}}
    return {"layer": section | {"prefill": prefill, "decode": part("decode, 32 sequences", row("ours", 1.5))}}


def test_the_table_of_a_layer(page):
    page.add("layer-test.json", layer_results())
    assert page.run() == 0
    table = page.text.split("results:layer")[1]
    rows = rows_of(table)
    assert rows[2] == [
        "prefill, 8192 tokens: flash-kda",
        "2.000",
        "1.800..2.200",
        "50 %",
        "20.00",
        "24",
        "3",
        "1.00",
    ]
    assert [row[0] for row in rows[3:6]] == [
        "prefill, 8192 tokens: transformers + FLA",
        "prefill, 8192 tokens: transformers, PyTorch",
        "decode, 32 sequences: flash-kda",
    ]
    assert rows[3][-1] == "3.50" and rows[4][1:3] == ["out of memory", ""]
    assert rows[-1] == ["chunk_kda", "0.220", "0.110", "2.00"]
    assert (
        "flash-kda 5.6e-03, transformers + FLA 6.9e-03." in table
        and "`python benchmarks/layer.py`\n" in table
    )
    content = layer_results()
    content["layer"] |= {"complete": False, "tokens": 512}
    del content["layer"]["prefill"]["rows"][1:], content["layer"]["errors"]["fla"]
    page.add("layer-test.json", content)
    assert page.run() == 0
    assert "`python benchmarks/layer.py --tokens 512 --no-fla --no-torch` The run was ended" in page.text
    for name in ("prefill", "decode", "errors"):
        del content["layer"][name]
    page.add("layer-test.json", content)
    assert page.run() == 0 and rows_of(page.text.split("results:layer")[1])[-1][0] == "chunk_kda"


def test_tables_without_fla(page):
    content = results()
    for section in ("errors", "prefill"):
        for row in content[section]["rows"]:
            row.pop("fla", None)
    page.add("prefill-test.json", content)
    assert page.run() == 0
    assert "| FLA" not in page.text and page.text.count("--no-fla`") == 2


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "all"])
def test_command_of_the_usual_cases(tables, quick):
    names = tables.QUICK if quick else [shape.name for shape in tables.CASES]
    rows = [{"case": name, "gate": gate, "fla": {}} for name in names for gate in tables.gates_of(name)]
    command = "python benchmarks/prefill.py" + " --quick" * quick
    assert tables.prefill_command(rows) == command
    for row in rows:
        if row["case"] != names[0]:
            del row["fla"]
    assert tables.prefill_command(rows) == f"{command} --fla {names[0]}"
    three = ("strong", "weak", "softplus")
    rows = [{"case": name, "gate": gate} for name in names for gate in three]
    assert tables.prefill_command(rows) == f"{command} --gates strong weak softplus --no-fla"


def test_a_run_that_was_ended_early(page):
    content = results()
    for name in ("errors", "prefill"):
        content[name]["complete"] = name == "errors"
    page.add("prefill-test.json", content)
    assert page.run() == 0
    errors, prefill = page.text.split("\ntext\n")
    assert "ended" not in errors and "The run was ended before its last measurement." in prefill
    content["prefill"]["rows"].clear()
    page.add("prefill-test.json", content)
    assert page.run() == 0


def test_memory_beyond_the_results(page):
    content = results()
    for row, extra_bytes in zip(content["prefill"]["rows"], (0, 512)):
        page.add("prefill-test.json", content)
        assert page.run() == 0 and "beyond" not in page.text
        row["ours"]["peak_extra_bytes"] = extra_bytes
    page.add("prefill-test.json", content)
    assert page.run() == 0 and "Peak of memory beyond the results, bytes: 512." in page.text


def test_every_device_has_its_table(page):
    other = results()
    other["prefill"]["environment"] = ENVIRONMENT | {"device": "NVIDIA Other"}
    del other["errors"]
    page.add("prefill-b.json", results())
    page.add("prefill-a.json", other)
    assert page.run() == 0
    errors, prefill = page.text.split("\ntext\n")
    assert "NVIDIA Other" not in errors
    assert 0 < prefill.index("NVIDIA Other") < prefill.index("NVIDIA Test 9000")


def test_no_results_are_said_to_be_none(page):
    assert page.run() == 0
    assert page.text.count("No results are recorded.") == 4 and "old" not in page.text


def test_check_tells_a_changed_number_and_a_new_result(page, capsys):
    page.add("prefill-test.json", results())
    assert page.run("--check") == 1
    before = page.text
    assert page.run() == 0 and page.run("--check") == 0 and page.text != before
    page.write(page.text.replace("3.50", "3.51"))
    written = page.text
    assert page.run("--check") == 1 and page.text == written
    assert page.run() == 0
    page.add("prefill-test2.json", results())
    capsys.readouterr()
    assert page.run("--check") == 1
    assert re.fullmatch(r"error: .*README.md is not what the results say; run .*\n", capsys.readouterr().err)


BAD_RESULTS = {
    "no-json": ("{", "prefill-test.json can't be read"),
    "no-object": ("[]", "prefill-test.json: expected a JSON object, got list"),
    "no-rows": ({"errors": {"environment": ENVIRONMENT}}, "prefill-test.json: errors is not as"),
}


@pytest.mark.parametrize("bad", BAD_RESULTS)
def test_bad_results(page, capsys, bad):
    content, message = BAD_RESULTS[bad]
    page.add("prefill-test.json", content)
    before = page.text
    assert page.run() == 1 and page.text == before
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        ("results:prefill", "results:training"),
        ("<!-- /results -->\n\ntext", "text"),
        ("<!-- results:errors -->", ""),
    ],
    ids=["unknown", "not-closed", "missing"],
)
def test_bad_sections(page, capsys, change):
    page.write(page.text.replace(*change))
    before = page.text
    assert page.run() == 1 and page.text == before
    assert "expected the sections errors, prefill, decode, layer" in capsys.readouterr().err
