"""get_kernel, has_kernel and LayerRepository against the loopback Hub: the true download path, offline."""

from __future__ import annotations

import platform

import pytest
import torch
from hub_client import NAME, stand_in
from loopback import Repository

# Prints the loaded package: its id, its file below the cache, its API, and a value it computes on the CPU.
LOAD = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import torch
torch.zeros(1).exp()  # torch's first exp, when it runs on several threads, may have 4 digits (seen in 2.13)
from kernels import get_kernel
package = get_kernel("org/flash-kda", {options})
torch.manual_seed(0)
q, k, v, g = (torch.randn(1, 20, 2, 128) for _ in range(4))
beta = torch.rand(1, 20, 2)
call = dict(use_qk_l2norm_in_kernel=True, output_final_state=True)
o, state = package.chunk_kda(q, k, v, -g.abs(), beta, **call)
expected, _ = package.reference.recurrent_kda(q, k, v, -g.abs(), beta, **call)
home = os.environ["HF_HOME"]
print(json.dumps(dict(
    id=package.__name__, file=os.path.relpath(package.__file__, home), names=sorted(package.__all__),
    error=((o - expected).norm() / expected.norm()).item(), state=list(state.shape),
)))
"""
TRUSTED = LOAD.format(options="version=1, trust_remote_code=True")


def load(options: str) -> str:
    return LOAD.format(options=options)


def test_cold_then_warm(hub, client):
    """The first call downloads one variant and no other; the second asks only whether version 1 has moved."""
    cold = client.output(TRUSTED)
    assert cold["file"].startswith("hub/kernels--org--flash-kda/snapshots/")
    assert cold["names"] == ["chunk_kda", "fused_kda_decode", "fused_recurrent_kda", "fwd", "layers", "reference"]
    assert cold["error"] < 1e-5 and cold["state"] == [1, 2, 128, 128]
    variants = {path.split("/")[1] for path in hub.downloads()}
    assert len(variants) == 1 and variants == {cold["file"].split("/")[-2]}

    hub.requests.clear()
    warm = client.output(TRUSTED)
    assert warm == cold
    assert hub.downloads() == []


def test_every_file_of_the_variant_arrives(hub, client, loadable_files):
    output = client.output(TRUSTED)
    variant = (client.home / output["file"]).parent
    prefix = f"build/{variant.name}/"
    expected = {
        path.removeprefix(prefix): data for path, data in loadable_files.items() if path.startswith(prefix)
    }
    arrived = {
        path.relative_to(variant).as_posix(): path.read_bytes()
        for path in variant.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert arrived == expected


def test_has_kernel(hub, client):
    """It looks at names and metadata alone: no compiled file is downloaded."""
    code = """
        import json
        from kernels import has_kernel
        print(json.dumps([has_kernel("org/flash-kda", version=1, trust_remote_code=True, check_arch=False)]))
    """
    assert client.output(code) == [True]
    assert not [path for path in hub.downloads() if path.endswith(".so")]

    repository = hub.repositories[NAME]
    files = {
        path: data
        for path, data in repository.commits[repository.branches["v1"]].items()
        if "build/" not in path
    }
    repository.commit("v1", files | {"build/torch212-metal-aarch64-darwin/metadata.json": b"{}"})
    assert client.output(code) == [False]


def test_revisions(hub, client):
    """A branch and a commit name the same build as the version."""
    by_version = client.output(TRUSTED)
    commit = hub.repositories[NAME].branches["v1"]
    for revision in ("v1", commit):
        assert client.output(load(f"revision={revision!r}, trust_remote_code=True")) == by_version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("version=7, trust_remote_code=True", "Version 7 not found, available versions: 1"),
        ("trust_remote_code=True", "version or revision must be specified"),
        ("version=1, revision='v1', trust_remote_code=True", "Only one of `revision` or `version`"),
        ("revision='nowhere', trust_remote_code=True", "nowhere"),
    ],
    ids=["unknown version", "neither", "both", "unknown revision"],
)
def test_versions_that_are_none(hub, client, options, message):
    result = client.run(load(options))
    assert result.returncode == 1 and message in result.stderr
    assert hub.downloads() == []


def test_two_versions_in_one_process(hub, client):
    """Each has its own module and its own operator; loading one does not touch the other."""
    hub.repositories[NAME].commit("v2", stand_in(2))
    output = client.output(
        """
        import json, os, sys
        sys.setdlopenflags(os.RTLD_LAZY)
        import torch
        from kernels import get_kernel
        one, two = (get_kernel("org/flash-kda", version=v, trust_remote_code=True) for v in (1, 2))
        operators = [getattr(torch.ops, package.__name__).kda_prefill.default for package in (one, two)]
        print(json.dumps(dict(
            ids=[one.__name__, two.__name__], files=[one.__file__, two.__file__],
            functions=one.chunk_kda is not two.chunk_kda, operators=[str(o) for o in operators],
            again=get_kernel("org/flash-kda", version=1, trust_remote_code=True) is one,
        )))
        """
    )
    assert len(set(output["ids"])) == len(set(output["files"])) == len(set(output["operators"])) == 2
    assert output["functions"] and output["again"]
    assert [name.split(".")[0] for name in output["operators"]] == output["ids"]


# ------------------------------------------------------------------------------------------ trust


def test_trust_is_asked_for(hub, client):
    """Native code of an unknown publisher is refused, and not even downloaded."""
    message = client.error(load("version=1"))
    assert message.startswith("ValueError: Kernel repository 'org/flash-kda' is not from a trusted publisher")
    assert hub.downloads() == []


@pytest.mark.parametrize(
    "options", ["trust_remote_code=True", "trust_remote_code=['org/flash-kda']", "trusted publisher"]
)
def test_trust_given(hub, client, options):
    if options == "trusted publisher":
        hub.trusted.add("org")
        options = "trust_remote_code=False"
    assert client.output(load(f"version=1, {options}"))["id"].startswith("_flash_kda_")


def test_trust_given_to_another_repository(hub, client):
    message = client.error(load("version=1, trust_remote_code=['org/other']"))
    assert "is not from a trusted publisher" in message


# ---------------------------------------------------------------------------------------- offline


def test_offline_with_a_warm_cache(hub, client):
    """Once the repository's version is downloaded as a whole, version, branch and commit load it without a
    Hub. (huggingface_hub 2 calls a snapshot of one variant, as get_kernel makes it, incomplete.)"""
    online = client.output(TRUSTED)
    commit = hub.repositories[NAME].branches["v1"]
    client.output(
        "from huggingface_hub import snapshot_download\n"
        f"snapshot_download({NAME!r}, repo_type='kernel', revision='v1')\n"
        "print('{}')"
    )
    hub.requests.clear()
    for options in ("version=1", "revision='v1'", f"revision={commit!r}"):
        assert client.output(load(options), HF_HUB_OFFLINE="1") == online
    assert hub.requests == []


def test_offline_with_an_empty_cache(hub, client):
    result = client.run(load("revision='v1'"), HF_HUB_OFFLINE="1")
    assert result.returncode == 1 and "Error" in result.stderr
    assert hub.requests == []


# ------------------------------------------------------------------------------- damaged downloads


def variant_file(hub, suffix: str) -> str:
    """Path of a file of the variant that this machine loads."""
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["v1"]]
    wanted = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    names = [path for path in files if path.endswith(suffix) and wanted in path.split("/")[1]]
    return names[0]


def test_a_short_download_is_noticed_and_repeated(hub, client):
    path = variant_file(hub, "/reference.py")
    hub.damage[path] = lambda content: content[: len(content) // 2]
    result = client.run(TRUSTED)
    assert result.returncode == 1 and "Consistency check failed" in result.stderr
    assert path.split("/")[-1] in result.stderr

    hub.damage.clear()
    assert client.output(TRUSTED)["error"] < 1e-5, "the next try loads a whole variant"


def test_a_changed_download_is_noticed_by_the_digest_alone(hub, client):
    """Same size, another byte: get_kernel loads it. `hf_layer.verify` says which file it is."""
    path = variant_file(hub, "/reference.py")
    hub.damage[path] = lambda content: content.replace(b"Kimi", b"Kimu", 1)
    output = client.output(TRUSTED)
    variant = (client.home / output["file"]).parent
    result = client.run(f"import sys; from hf_layer.verify import main; sys.exit(main([{str(variant)!r}]))")
    assert result.returncode == 1
    assert result.stdout.startswith(f"{variant.name}: changed: reference.py (")


# --------------------------------------------------------------------------------- no such variant


@pytest.fixture
def foreign(hub, real_files):
    """The repository with variants of another machine alone."""
    repository = hub.repositories[NAME] = Repository()
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    old, new = (f"-{machine}-linux/" for machine in (platform.machine(), other))
    repository.commit("v1", {path.replace(old, new): content for path, content in real_files.items()})
    return hub


def variants_of(hub) -> set[str]:
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["v1"]]
    return {path.split("/")[1] for path in files if path.startswith("build/")}


def test_missing_variant(foreign, client):
    """The error names what there is and why it does not fit."""
    result = client.run(TRUSTED)
    assert result.returncode == 1 and "FileNotFoundError" in result.stderr
    assert all(variant in result.stderr for variant in variants_of(foreign))
    assert not [path for path in foreign.downloads() if path.endswith(".so")]


def test_layer_falls_back_without_a_variant(foreign, client):
    """load_kernel keeps the reason in one line, and the layer runs on the reference."""
    output = client.output(
        """
        import json, torch
        from hf_layer import KimiDeltaAttention, kernel_status, load_kernel, loading
        torch.cuda.is_available = lambda: True      # as on a machine with a GPU,
        loading.checkout_with_build = lambda: None  # away from any checkout
        load = load_kernel()
        layer = KimiDeltaAttention(hidden_size=32, num_heads=1, head_dim=16).eval()
        with torch.no_grad():
            o = layer(torch.randn(1, 5, 32))
        o = o[0] if isinstance(o, tuple) else o
        found = dict(module=load.module, reason=load.reason, status=kernel_status(), shape=list(o.shape))
        print(json.dumps(found))
        """,
        FLASH_KDA_TRUST_REMOTE_CODE="1",
    )
    assert output["module"] is None and output["shape"] == [1, 5, 32]
    assert output["reason"].startswith("the Hub (org/flash-kda): FileNotFoundError: ")
    assert output["status"] == f"reference: {output['reason']}" and "\n" not in output["status"]


# -------------------------------------------------------------------------------- in transformers


def test_layer_repository_through_transformers(hub, client):
    """A Kimi-Linear model takes both function layers from the Hub and gives its own tokens."""
    pytest.importorskip("transformers", minversion="5.20.2")
    output = client.output(
        """
        import json, os, sys
        sys.setdlopenflags(os.RTLD_LAZY)
        import torch
        from kernels import LayerRepository, Mode, get_loaded_kernels, register_kernel_mapping
        from transformers import KimiLinearConfig, KimiLinearForCausalLM

        config = KimiLinearConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
            num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, linear_head_dim=128,
            linear_num_heads=2, layer_types=["linear_attention", "full_attention"],
            mlp_layer_types=["dense", "dense"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
        torch.manual_seed(0)
        model = KimiLinearForCausalLM(config).eval()
        ids = torch.randint(3, 64, (2, 9))
        generate = lambda: model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()
        before = generate()

        def layer(name):
            return LayerRepository("org/flash-kda", layer_name=name, version=1, trust_remote_code=True)

        register_kernel_mapping({
            "chunk_kda": {"cpu": {Mode.INFERENCE: layer("FlashKDAChunk")}},
            "fused_recurrent_kda": {"cpu": {Mode.INFERENCE: layer("FlashKDARecurrent")}},
        })
        model.set_use_kernels(True)
        (loaded,) = get_loaded_kernels()
        calls = []
        layers = loaded.module.layers
        for name in ("chunk_kda", "fused_recurrent_kda"):
            def count(*arguments, _call=getattr(layers, name), _name=name, **keywords):
                calls.append(_name)
                return _call(*arguments, **keywords)
            setattr(layers, name, count)
        after = generate()
        print(json.dumps(dict(same=before == after, calls=calls, repo=loaded.repo_info.repo_id)))
        """
    )
    assert output["same"] and output["repo"] == NAME
    assert output["calls"].count("chunk_kda") == 1 and len(output["calls"]) == 4  # the prompt, then 3 tokens
