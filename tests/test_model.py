import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as ours
from tests.tiny import FAMILIES, make_model


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
    """fp32 rounds relative to what it rounds: larger logits may differ more."""
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0)


def equal_states(one, other):
    return all(torch.equal(other[name], value) for name, value in one.items())


# -------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    ("family", "tied", "kv_heads", "head_dim"),
    [
        ("qwen2", True, 2, 8),
        ("qwen2", False, 1, 24),
        ("qwen3", True, 1, 34),
        ("qwen3", False, 4, 8),
        ("llama", False, 2, 8),
        ("llama3", True, 4, 24),
        ("llama3", False, 1, 8),
    ],
)
@torch.no_grad()
def test_logits_equal_transformers_after_load_and_save(tmp_path, family, tied, kv_heads, head_dim):
    theirs = make_model(tmp_path / "hf", family, tied, kv_heads, head_dim)
    ids = some_ids()
    want = theirs(ids).logits
    assert want.abs().max() > 0.5
    assert_same_logits(our_logits(tmp_path / "hf", ids), want)

    ours.save(ours.load(tmp_path / "hf"), tmp_path / "saved")
    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(back(ids).logits, want, atol=0, rtol=0)
    assert_same_logits(our_logits(tmp_path / "saved", ids), want)
    assert ("lm_head.weight" in load_file(tmp_path / "saved/model.safetensors")) != tied


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_configs_of_older_transformers_are_read(tmp_path, family):
    theirs = make_model(tmp_path, family)
    rope = dict(FAMILIES[family][1])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=None if kind == "default" else {"type": kind, **rope},  # the oldest spelling
        dtype=None,
        torch_dtype="float32",
    )
    assert_same_logits(our_logits(tmp_path, some_ids()), theirs(some_ids()).logits)


@torch.no_grad()
def test_qwen3_without_head_dim_means_128(tmp_path):
    theirs = make_model(tmp_path, "qwen3", head_dim=128)
    edit_config(tmp_path, head_dim=None)
    assert_same_logits(our_logits(tmp_path, some_ids((1, 20))), theirs(some_ids((1, 20))).logits)


# -------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_packed_forward_and_backward_equal_one_by_one(tmp_path, family):
    """Sequences alone in their segment and with a shared prefix, of lengths that bucket apart."""
    make_model(tmp_path, family)
    model = ours.load(tmp_path, dtype=torch.float64)
    segments = [(9, 3, 4, 17), 5, (2, 0, 6), (7, 0), (1,), 31, 1]
    shapes = [(s,) if isinstance(s, int) else s for s in segments]
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
    packed = model(row, segments=segments)
    torch.testing.assert_close(packed, want, atol=1e-12, rtol=0)
    (packed * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_short_sequences_are_not_padded_to_the_longest():
    packing = ours.make_packing([3, (100,), (4, 2, 90), (1, 1)], torch.zeros(1, 201))
    shapes = sorted(tuple(grid.shape) for grid in packing.grids)
    assert shapes == [(1, 6), (2, 3), (2, 100)]  # of 3 and 2, of 6, of 100 and 94


@pytest.mark.parametrize("segments", [[4, 4], [9, 0], [10, -1], [(0, 9)], [(10, -1)], [(), (9,)]])
def test_segments_that_do_not_fill_the_row_are_refused(segments):
    with pytest.raises(ValueError, match="segments"):
        ours.make_packing(segments, some_ids((1, 9)))


def test_checkpointing_changes_no_gradient(tmp_path):
    make_model(tmp_path)
    model = ours.load(tmp_path)
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model.logits(model(some_ids((1, 9)), segments=[4, 5])).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads))


# -------------------------------------------------------------------------- precision


def test_fp32_masters_compute_like_a_bf16_copy(tmp_path):
    """A trainer with fp32 masters and a sampler with a bf16 copy see the very same numbers."""
    make_model(tmp_path)
    master, copy = ours.load(tmp_path), ours.load(tmp_path, dtype=torch.bfloat16)
    master.compute_dtype = torch.bfloat16
    ids = some_ids()
    hidden = master(ids)
    assert hidden.dtype == torch.bfloat16
    logits = master.logits(hidden)
    exact = hidden.double() @ copy.head_weight.double().T  # not rounded to bf16
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits, copy.logits(copy(ids)))
    logits.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in master.parameters())


# -------------------------------------------------------------------------- files


@torch.no_grad()
def test_sharded_folders_are_read(tmp_path):
    theirs = make_model(tmp_path, tied=False)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert_same_logits(our_logits(tmp_path, some_ids()), theirs(some_ids()).logits)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        ours.load(tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
def test_failed_or_killed_save_leaves_the_earlier_one_intact(tmp_path, monkeypatch, failing):
    make_model(tmp_path / "hf")
    model, folder = ours.load(tmp_path / "hf"), tmp_path / "saved"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours.save(model, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)

    def fail(*_):
        raise KeyboardInterrupt if failing == "os.fsync" else OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"model.{failing}", fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            ours.save(model, folder)
    assert equal_states(before, ours.load(folder).state_dict())
    ours.save(model, folder)
    assert equal_states(model.state_dict(), ours.load(folder).state_dict())


def test_a_saved_config_keeps_unknown_keys_and_has_those_of_both_generations(tmp_path):
    make_model(tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=[1, 7], somebody="else")
    ours.save(ours.load(tmp_path / "hf"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["eos_token_id"] == [1, 7] and config["somebody"] == "else"
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6


def test_hub_ids_go_through_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--tiny"
    make_model(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert ours.load("org/tiny").config.vocab_size == 99
    with pytest.raises(
        FileNotFoundError, match=r"org/absent: .* Offline, give a folder; .* set HF_TOKEN"
    ):
        ours.load("org/absent")


# -------------------------------------------------------------------------- bad input


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
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "lacks the key num_hidden_layers"),
        ({"rope_parameters": None}, "rope_theta=None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"num_hidden_layers": 3}, r"tensor model.layers.2.\S+ is missing in the files"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* but config.json asks for no such tensor"),
        ({"intermediate_size": 48}, r"proj.weight is \(32, 56\) .* asks for \(32, 48\)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_key(tmp_path, changes, match):
    make_model(tmp_path, tied=True)
    edit_config(tmp_path, **changes)
    refused(tmp_path, match)


def test_broken_files_are_named(tmp_path):
    make_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors, content = load_file(weights), weights.read_bytes()
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights)
    assert ours.load(tmp_path).head is None  # the same matrix twice is no contradiction
    for size in (4, len(content) - 1):
        weights.write_bytes(content[:size])
        refused(tmp_path, r"model.safetensors is incomplete, fetch or save it again")
    weights.unlink()
    refused(tmp_path, "holds neither model.safetensors nor")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "No such file .*config.json")
    refused(tmp_path / "nowhere", "no such folder")
    refused("./nowhere", "no such folder")
