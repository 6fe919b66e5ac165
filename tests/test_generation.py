"""transformers' models with our layers write the tokens that they write without: every way to generate, on
tiny random models of the three families in float32 on the CPU, with the kernel's CPU variant."""

from __future__ import annotations

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
import hf_layer  # noqa: E402
from hf_layer import models  # noqa: E402
from tiny_models import FAMILIES, build, one_thread, prompts  # noqa: E402, F401

NEW = dict(max_new_tokens=8, min_new_tokens=8)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for float32 rounding, 3e-5 of the largest value: against the same model in float64
    transformers' own code is off by half of that, ours by a tenth."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * wanted.abs().max().item())


@pytest.fixture(params=["whole layer", "functions"])
def put_in(request, hooks, cpu_kernel):
    """Puts our layers into a model: the whole KDA layer, or the two functions that transformers' calls."""

    def put(model):
        if request.param == "functions":
            hf_layer.register(devices="cpu")
            model.set_use_kernels(True)
            for _, module in models.kda_modules(model):
                del module.forward
        else:
            hf_layer.kernelize(model)
        report = hf_layer.report(model)
        assert report.kernel_runs, str(report)
        assert all(
            layer.prefill.startswith("whole") == (request.param != "functions") for layer in report.layers
        )
        return model

    return put


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def without_and_with(model, put_in, run):
    """What `run` gives with transformers' own code, and with ours."""
    wanted = run()
    put_in(model)
    return wanted, run()


WAYS = {
    "greedy": dict(do_sample=False),
    "no cache": dict(do_sample=False, use_cache=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.95),
    "beam search": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "beam sampling": dict(do_sample=True, num_beams=2),
    "static cache": dict(do_sample=False, cache_implementation="static", disable_compile=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(model, put_in, way):
    def run():
        torch.manual_seed(7)
        return model.generate(prompts(), **NEW, **WAYS[way])

    wanted, tokens = without_and_with(model, put_in, run)
    assert wanted.shape[1] == 9 + 8 and torch.equal(tokens, wanted)


def test_left_padding(model, put_in):
    """As without us; and a padded row as the same prompt alone."""
    ids = prompts()
    ids[0, :4] = 0
    mask = (ids != 0).long()

    def run():
        return model.generate(ids, attention_mask=mask, do_sample=False, **NEW)

    wanted, tokens = without_and_with(model, put_in, run)
    assert torch.equal(tokens, wanted)
    assert torch.equal(tokens[:1, 9:], model.generate(ids[:1, 4:], do_sample=False, **NEW)[:, 5:])


def test_one_token_prompt(model, put_in):
    wanted, tokens = without_and_with(
        model, put_in, lambda: model.generate(prompts(tokens=1), do_sample=False, **NEW)
    )
    assert torch.equal(tokens, wanted)


def test_chat_turns(model, put_in):
    """A cache goes on: with the next turn of several tokens, and of one."""

    def run():
        turns, cache = prompts(rows=1), None
        for new in (prompts(1, 5, seed=1), prompts(1, 1, seed=2), None):
            done = model.generate(
                turns, past_key_values=cache, do_sample=False, return_dict_in_generate=True, **NEW
            )
            turns, cache = done.sequences, done.past_key_values
            if new is not None:
                turns = torch.cat([turns, new], dim=1)
        return turns

    wanted, tokens = without_and_with(model, put_in, run)
    assert torch.equal(tokens, wanted)
    assert wanted.shape[1] == 9 + 3 * 8 + 5 + 1


@torch.no_grad()
def test_logits_of_a_prompt_in_parts(model, put_in):
    """Prefill, continued prefill and decode; ours and transformers' own code leave equal caches."""
    ids = prompts(tokens=80)
    parts = ids.split((1, 2, 70, 1, 1, 5), dim=1)
    config = model.config.get_text_config()

    def run():
        cache = transformers.DynamicCache(config=config)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
        kda = [module.layer_idx for _, module in models.kda_modules(model)]
        states = [(cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0]) for i in kda]
        return logits, states

    (wanted, wanted_states), (logits, states) = without_and_with(model, put_in, run)
    assert_same(logits, wanted)
    for found, expected in zip(states, wanted_states):
        for one, other in zip(found, expected):
            assert_same(one, other)
        assert found[1].dtype == torch.float32


@torch.no_grad()
def test_a_cache_changes_hands(model, hooks, cpu_kernel):
    """Our layers go on from transformers' cache, and transformers' own code from ours."""
    config = model.config.get_text_config()
    ids = prompts(tokens=20)
    wanted = model(ids).logits
    for first, second in (
        (hf_layer.unkernelize, hf_layer.kernelize),
        (hf_layer.kernelize, hf_layer.unkernelize),
    ):
        cache = transformers.DynamicCache(config=config)
        logits = [first(model)(ids[:, :11], past_key_values=cache).logits]
        for token in ids[:, 11:].split(1, dim=1):
            logits.append(second(model)(token, past_key_values=cache).logits)
        assert_same(torch.cat(logits, dim=1), wanted)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 4, 1, 30), (3, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_prompts(family, hooks, cpu_kernel, lengths):
    """Each prompt of a packed row gives the logits of its own run. transformers' own KDA code mixes them (and
    so does GLM-5-next's other attention, so here it has none)."""
    layer_types = {
        "layer_types": ["linear_attention"] * 2,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense"] * 2,
    }
    model = build(family, **(layer_types if family == "glm5_next" else {}))
    row = prompts(rows=1, tokens=sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packing = dict(
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(lengths), max_length_k=max(lengths),
        use_cache=False,
    )  # fmt: skip
    alone = torch.cat([model(part, use_cache=False).logits for part in row.split(lengths, dim=1)], dim=1)
    assert not torch.allclose(model(row, **packing).logits, alone, atol=1.0)
    hf_layer.kernelize(model)
    assert_same(model(row, **packing).logits, alone)


@pytest.mark.parametrize("way", ["assistant", "prompt lookup", "multi-token prediction"])
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation(family, put_in, way):
    if way == "multi-token prediction" and family != "bailing_hybrid":
        pytest.skip(f"{family} has no multi-token prediction")
    model = build(family, **(dict(num_mtp_layers=1) if way == "multi-token prediction" else {}))
    help = {
        "assistant": dict(assistant_model=build(family, seed=1)),
        "prompt lookup": dict(prompt_lookup_num_tokens=2),
        "multi-token prediction": dict(use_mtp=True),
    }[way]

    def run():
        return model.generate(prompts(rows=1), do_sample=False, **NEW, **help)

    try:
        run()
    except ValueError as refusal:
        assert "stateful" in str(refusal)
        pytest.skip(f"transformers refuses: {refusal}")
    wanted, tokens = without_and_with(model, put_in, run)
    assert torch.equal(tokens, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compiled_decode_with_static_shapes(family, put_in):
    """One graph without breaks for every step; a static cache's tensors keep their place."""
    model = build(family)
    config = model.config.get_text_config()
    ids, steps = prompts(), prompts(tokens=4, seed=3).split(1, dim=1)

    def run(compile):
        torch.compiler.reset()
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        model(ids, past_key_values=cache)
        kda = [module.layer_idx for _, module in models.kda_modules(model)]
        places = [cache.layers[i].recurrent_states[0].data_ptr() for i in kda]
        decode = (
            torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compile else model
        )
        logits = [decode(step, past_key_values=cache).logits for step in steps]
        assert places == [cache.layers[i].recurrent_states[0].data_ptr() for i in kda]
        return torch.cat(logits, dim=1)

    wanted = run(compile=False)
    put_in(model)
    assert_same(run(compile=True), wanted)


def test_many_models_at_once(hooks, cpu_kernel):
    """The functions of a family belong to all its models; each writes its own tokens, ours or not."""
    ours, other, small = build("kimi_linear"), build("kimi_linear", seed=1), build("kimi_linear", head_dim=32)

    def run():
        return [model.generate(prompts(), do_sample=False, **NEW) for model in (ours, other, small)]

    wanted = run()
    hf_layer.register(devices="cpu")
    ours.set_use_kernels(True)
    small.set_use_kernels(True)
    assert all(torch.equal(one, another) for one, another in zip(run(), wanted))
    (why,) = {layer.why for layer in hf_layer.report(small).layers}
    assert why == "K and V are not both 128"
