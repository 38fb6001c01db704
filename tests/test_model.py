import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as ours
from tests.tiny import FAMILIES, make_model

SHAPES = [  # family, tied, kv_heads, head_dim
    ("qwen2", True, 2, 8),
    ("qwen2", False, 1, 24),
    ("qwen2", True, 4, 20),
    ("qwen3", True, 2, 24),
    ("qwen3", False, 4, 8),
    ("qwen3", True, 1, 34),
    ("llama", False, 2, 8),
    ("llama", True, 4, 24),
    ("llama3", True, 2, 16),
    ("llama3", False, 1, 8),
    ("linear", True, 2, 8),
]


def some_ids(shape=(2, 150), vocab=99):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


def edit_config(folder, **changes):
    """Set keys of config.json; a change to None removes the key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@torch.no_grad()
def our_logits(folder, ids):
    model = ours.load(folder)
    return model.logits(model(ids))


def assert_same_logits(got, want):
    """fp32 rounds relative to what it rounds: the larger the logits, the more they may differ."""
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0)


@torch.no_grad()
def test_logits_as_large_as_a_real_models_agree(tmp_path):
    theirs = make_model(tmp_path)
    theirs.model.norm.weight.mul_(40)
    theirs.save_pretrained(tmp_path)
    want = theirs(some_ids()).logits
    assert want.abs().max() > 20
    assert_same_logits(our_logits(tmp_path, some_ids()), want)


@pytest.mark.parametrize(("family", "tied", "kv_heads", "head_dim"), SHAPES)
@torch.no_grad()
def test_logits_equal_transformers_both_ways(tmp_path, family, tied, kv_heads, head_dim):
    theirs = make_model(tmp_path / "hf", family, tied, kv_heads, head_dim)
    ids = some_ids()
    want = theirs(ids).logits
    assert want.abs().max() > 0.5  # logits of some size, or the comparison would be empty
    assert_same_logits(our_logits(tmp_path / "hf", ids), want)

    ours.save(ours.load(tmp_path / "hf"), tmp_path / "saved")
    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(back(ids).logits, want, atol=0, rtol=0)
    assert_same_logits(our_logits(tmp_path / "saved", ids), want)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_configs_of_both_generations_are_read(tmp_path, family):
    theirs = make_model(tmp_path, family)
    rope = dict(FAMILIES[family][1])
    ids = some_ids()
    want = theirs(ids).logits
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}  # the oldest spelling
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=scaling,
        dtype=None,
        torch_dtype="float32",
    )
    assert_same_logits(our_logits(tmp_path, ids), want)


@torch.no_grad()
def test_rope_scaling_and_theta_matter(tmp_path):
    """The comparisons above would not see a rope that is ignored if it changed nothing."""
    make_model(tmp_path, "llama3")
    ids = some_ids()
    with_scaling = our_logits(tmp_path, ids)
    edit_config(tmp_path, rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"})
    without = our_logits(tmp_path, ids)
    edit_config(tmp_path, rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"})
    assert (with_scaling - without).abs().max() > 1e-2
    assert (our_logits(tmp_path, ids) - without).abs().max() > 1e-2


@pytest.mark.slow
def test_saved_folders_load_in_transformers_4(tmp_path):
    """transformers 4.57 in a folder of its own, beside our torch."""
    packages = ["transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target"]
    subprocess.run([*pip, str(tmp_path / "old"), *packages], check=True)
    for family in FAMILIES:
        make_model(tmp_path / family, family, tied=family != "llama")
        ours.save(ours.load(tmp_path / family), tmp_path / f"{family}-saved")
        torch.save(our_logits(tmp_path / family, some_ids()), tmp_path / f"{family}.pt")
    code = """
import sys, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4.57"), transformers.__version__
root, ids = Path(sys.argv[1]), torch.tensor(eval(sys.argv[2]))
for family in sys.argv[3:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / f"{family}-saved")
    with torch.no_grad():
        logits = model(ids).logits
    gap, size = (logits - torch.load(root / f"{family}.pt")).abs().max(), logits.abs().max()
    assert gap < 1e-5 * size, (family, gap, size)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "old")}
    ids = str(some_ids().tolist())
    command = [sys.executable, "-c", code, str(tmp_path), ids, *FAMILIES]
    subprocess.run(command, check=True, env=environment)


# ------------------------------------------------------------------------------ packed rows


@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 1, 17, 8, 16, 3, 31, 2]])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_packed_forward_and_backward_equal_one_by_one(tmp_path, family, lengths):
    make_model(tmp_path, family)
    model = ours.load(tmp_path, dtype=torch.float64)
    sequences = some_ids((1, sum(lengths)))[0].split(lengths)
    draw = torch.Generator().manual_seed(2)
    shape = (1, sum(lengths), model.config.hidden_size)
    weights = torch.randn(shape, generator=draw, dtype=torch.float64)

    alone = torch.cat([model(ids[None]) for ids in sequences], dim=1)
    (alone * weights).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = model(torch.cat(sequences)[None], segments=lengths)
    (packed * weights).sum().backward()

    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=0)
    assert len(want) == len(list(model.parameters()))
    for name, grad in want.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, msg=name)


def test_packed_neighbours_do_not_see_each_other(tmp_path):
    make_model(tmp_path)
    model = ours.load(tmp_path)
    row = some_ids((1, 12))
    before = model(row, segments=[4, 8])
    row[0, :4] = 5
    after = model(row, segments=[4, 8])
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before[:, :4], after[:, :4])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_sequences_begin_with_is_computed_once(tmp_path, family):
    """Forward and backward, beside each sequence alone: (first, of each what follows)."""
    make_model(tmp_path, family)
    model = ours.load(tmp_path, dtype=torch.float64)
    shapes = [(9, 3, 4, 17), (5,), (2, 0, 6), (7, 0)]
    row = some_ids((1, sum(map(sum, shapes))))
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn((*row.shape, model.config.hidden_size), generator=draw).double()
    want, at, loss = torch.empty_like(weights), 0, 0.0
    for first, *rest in shapes:
        prompt = slice(at, at + first)
        at += first
        alone = model(row[:, prompt])
        want[:, prompt] = alone.detach()
        loss = loss + (alone * weights[:, prompt]).sum()
        for more in rest:
            here = slice(at, at + more)
            at += more
            alone = model(torch.cat((row[:, prompt], row[:, here]), dim=1))[:, first:]
            want[:, here] = alone.detach()
            loss = loss + (alone * weights[:, here]).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed = model(row, segments=shapes)
    torch.testing.assert_close(packed, want, atol=1e-12, rtol=0)
    (packed * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_short_sequences_are_not_padded_to_the_longest():
    packing = ours.pack([(3,), (100,), (4, 2, 90), (1, 1)], torch.device("cpu"))
    shapes = sorted(tuple(grid.shape) for grid in packing.grids)
    assert shapes == [(1, 6), (2, 3), (2, 100)]  # of 3 and 2, of 6, of 100 and 94
    assert sorted(packing.back.tolist()) == sorted({*packing.back.tolist()})


@pytest.mark.parametrize(
    "segments", [[4, 4], [9, 0], [10, -1], [(5, 5)], [(0, 9)], [(10, -1)], [(), (9,)]]
)
def test_segments_that_do_not_fill_the_row_are_refused(tmp_path, segments):
    make_model(tmp_path)
    with pytest.raises(ValueError, match="segments"):
        ours.load(tmp_path)(some_ids((1, 9)), segments=segments)


def test_checkpointing_changes_no_gradient(tmp_path):
    make_model(tmp_path)
    model = ours.load(tmp_path)
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model.logits(model(some_ids((1, 9)), segments=[4, 5])).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------ precision


def test_fp32_masters_with_bf16_activations(tmp_path):
    make_model(tmp_path)
    master, copy = ours.load(tmp_path), ours.load(tmp_path, dtype=torch.bfloat16)
    master.compute_dtype = torch.bfloat16
    ids = some_ids()
    hidden = master(ids)
    assert hidden.dtype == torch.bfloat16
    logits = master.logits(hidden)
    assert logits.dtype == torch.float32
    # A trainer with fp32 masters and a sampler with a bf16 copy see the very same numbers.
    assert torch.equal(logits, copy.logits(copy(ids)))
    logits.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in master.parameters())


@torch.no_grad()
def test_logits_are_not_rounded_to_bf16(tmp_path):
    make_model(tmp_path)
    model = ours.load(tmp_path, dtype=torch.bfloat16)
    hidden = model(some_ids())
    exact = hidden.double() @ model.head_weight.double().T
    torch.testing.assert_close(model.logits(hidden).double(), exact, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------ files


def test_tied_model_has_one_matrix_and_saves_it_once(tmp_path):
    make_model(tmp_path / "hf", tied=True)
    model = ours.load(tmp_path / "hf")
    assert model.head is None
    ours.save(model, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]


@torch.no_grad()
def test_sharded_folders_both_ways(tmp_path, monkeypatch):
    theirs = make_model(tmp_path / "hf", tied=False)
    theirs.save_pretrained(tmp_path / "hf-sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "hf-sharded").glob("model-*.safetensors"))) > 2
    ids = some_ids()
    want = theirs(ids).logits
    assert_same_logits(our_logits(tmp_path / "hf-sharded", ids), want)

    model = ours.load(tmp_path / "hf")
    monkeypatch.setattr(ours, "SHARD_BYTES", 20_000)
    ours.save(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(back(ids).logits, want)
    assert_same_logits(our_logits(tmp_path / "saved", ids), want)

    monkeypatch.setattr(ours, "SHARD_BYTES", 10**9)  # a later save in one file replaces the many
    ours.save(model, tmp_path / "saved")
    names = sorted(p.name for p in (tmp_path / "saved").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert_same_logits(our_logits(tmp_path / "saved", ids), want)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 8), (8, 1), (8, 8)])
def test_failed_save_leaves_the_earlier_one_whole(tmp_path, monkeypatch, before, after):
    """The disk fills up at the last file of the new save, be it of one file or of many."""
    make_model(tmp_path / "hf")
    model = ours.load(tmp_path / "hf")
    bytes_for = {1: 10**9, 8: 14_000}
    monkeypatch.setattr(ours, "SHARD_BYTES", bytes_for[before])
    ours.save(model, tmp_path / "saved")
    files = sorted(p.name for p in (tmp_path / "saved").iterdir())
    assert len(files) == {1: 2, 8: 10}[before]
    kept = tmp_path / "saved" / "model-lora.safetensors"  # somebody else's
    kept.write_bytes(b"mine")

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    written = []

    def full_disk(tensors, path, metadata):
        written.append(path)
        if len(written) == after:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(ours, "SHARD_BYTES", bytes_for[after])
    monkeypatch.setattr(ours, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        ours.save(model, tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted([*files, kept.name])
    state = ours.load(tmp_path / "saved").state_dict()
    assert all(torch.equal(state[k] + 1.0, v) for k, v in model.state_dict().items())

    monkeypatch.setattr(ours, "save_file", save_file)
    ours.save(model, tmp_path / "saved")
    state = ours.load(tmp_path / "saved").state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert kept.read_bytes() == b"mine"


@pytest.mark.parametrize(("before", "after"), [(10**9, 14_000), (14_000, 10**9), (14_000, 14_000)])
def test_save_cut_short_at_any_rename_never_loads_a_mixture(tmp_path, monkeypatch, before, after):
    make_model(tmp_path / "hf")
    old, new = ours.load(tmp_path / "hf"), ours.load(tmp_path / "hf")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1.0)
    for cut in range(11):
        folder = tmp_path / f"cut-{cut}"
        monkeypatch.setattr(ours, "SHARD_BYTES", before)
        ours.save(old, folder)
        renamed = []

        def killed(source, target, renamed=renamed, cut=cut):
            if len(renamed) == cut:
                raise KeyboardInterrupt
            renamed.append(target)
            Path(source).rename(target)

        monkeypatch.setattr(ours, "SHARD_BYTES", after)
        with monkeypatch.context() as patch:
            patch.setattr(ours.os, "replace", killed)
            with contextlib.suppress(KeyboardInterrupt):
                ours.save(new, folder)
        try:
            state = ours.load(folder).state_dict()
        except (ValueError, FileNotFoundError):
            continue  # refused by name
        whole = [
            all(torch.equal(state[k], v) for k, v in model.state_dict().items())
            for model in (old, new)
        ]
        assert any(whole), f"cut at rename {cut}: a mixture was loaded"


@torch.no_grad()
def test_qwen3_without_head_dim_means_128(tmp_path):
    theirs = make_model(tmp_path, "qwen3", head_dim=128)
    ids = some_ids((1, 20))
    want = theirs(ids).logits
    edit_config(tmp_path, head_dim=None)
    assert_same_logits(our_logits(tmp_path, ids), want)


def test_unknown_keys_of_the_config_survive_a_round_trip(tmp_path):
    make_model(tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=[1, 7], somebody="else")
    ours.save(ours.load(tmp_path / "hf"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["eos_token_id"] == [1, 7] and config["somebody"] == "else"


@torch.no_grad()
def test_random_start_is_trainable_and_saves(tmp_path):
    config = ours.Config("qwen3", 50, 32, 48, 2, 4, 2, 16, 64, tied=False)
    torch.manual_seed(0)
    model = ours.Transformer(config)
    ours.save(model, tmp_path)
    ids = some_ids((2, 9), vocab=50)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    got = model.logits(model(ids))
    assert_same_logits(got, theirs(ids).logits)


def test_hub_ids_go_through_the_hub_cache(tmp_path):
    """Offline: a cached snapshot is found, an unknown one is named with what to do."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc"
    make_model(snapshot)
    refs = tmp_path / "hub" / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    code = (
        "import model; print(model.load('org/tiny').config.vocab_size)\n"
        "try: model.load('org/absent')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("99\n")
    assert "org/absent" in output and "offline" in output and "HF_TOKEN" in output


# ------------------------------------------------------------------------------ bad input


def refused(folder, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        ours.load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is unknown; known: qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "the key 'num_hidden_layers' is missing"),
        ({"rope_parameters": None}, "neither rope_theta nor rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "the key 'factor'"),
        ({"rope_theta": 5.0}, "rope_parameters say rope_theta=1000000.0, the older keys 5.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "say rope_type='default', the older"),
        ({"vocab_size": "many"}, "the key 'vocab_size' is missing or not of its type"),
        ({"hidden_size": 32.5}, "the key 'hidden_size' is missing or not of its type"),
        ({"num_hidden_layers": -2}, "num_hidden_layers -2 must be at least 1"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 3}, "tensors are missing, first model.layers.2"),
        ({"num_hidden_layers": 1}, "no place in a qwen2 model of 1 layers, first model.layers.1"),
        ({"intermediate_size": 48}, r"gate_proj.weight has the shape \(56, 32\).*\(48, 32\)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing although tie_word_embeddings"),
        ({"tie_word_embeddings": None}, "lm_head.weight is missing although tie_word_embeddings"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_key(tmp_path, changes, match):
    make_model(tmp_path, tied=True)
    edit_config(tmp_path, **changes)
    refused(tmp_path, match)


def test_tied_config_with_another_head_is_refused(tmp_path):
    make_model(tmp_path, tied=False)
    edit_config(tmp_path, tie_word_embeddings=True)
    refused(tmp_path, "tie_word_embeddings is true, but lm_head.weight differs")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert ours.load(tmp_path).head is None  # the same matrix twice is no contradiction


def test_broken_files_are_named(tmp_path):
    make_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for size in (4, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(tmp_path, r"model.safetensors is not a whole safetensors file")
    weights.unlink()
    refused(tmp_path, "holds neither model.safetensors nor")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json holds list, not an object")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json is missing")
    refused(tmp_path / "nowhere", "no such folder")
    refused("./nowhere", "no such folder")


def test_missing_shard_is_named(tmp_path):
    make_model(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    gone = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path / "sharded", f"{gone.name} is named in model.safetensors.index.json")


def test_integer_weights_are_refused_by_name(tmp_path):
    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "model.norm.weight has the type torch.int8")


@pytest.mark.parametrize("bad", [-1, 99])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    make_model(tmp_path)
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 99"):
        ours.load(tmp_path)(torch.tensor([[1, bad]]))


def test_shapes_that_would_broadcast_are_refused(tmp_path):
    make_model(tmp_path)
    model = ours.load(tmp_path)
    with pytest.raises(ValueError, match=r"positions \(8,\) for ids \(1, 8\)"):
        model(some_ids((1, 8)), positions=torch.arange(8))
    with pytest.raises(ValueError, match="ids must be"):
        model(some_ids((8,)))
