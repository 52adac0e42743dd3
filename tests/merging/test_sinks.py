"""Live weights and weights on disk: the same bits, and no half-written surprises."""

import pytest
import torch

from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.folder import write_folder
from evomerge.merging.live import write_live
from tests.merging.small import TASK_ARITHMETIC, make_sources, make_tensors, plan_of

DARE = TASK_ARITHMETIC.replace("task_arithmetic", "dare_ties") + "parameters: {density: 0.5}\n"


class Net(torch.nn.Module):
    """A module whose state dict has given names; `tied` names share the tensor of another."""

    def __init__(self, tensors, tied=None, dtype=torch.float32):
        super().__init__()
        for name, tensor in tensors.items():
            self._place(name, torch.nn.Parameter(torch.zeros_like(tensor, dtype=dtype)))
        for name, other in (tied or {}).items():
            self._place(name, self.get_parameter(other))
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)

    def _place(self, name, parameter):
        *path, last = name.split(".")
        module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, parameter)


def live(text, sources, model):
    return write_live(plan_of(text, sources), sources, StatisticsCache(), model)


def on_disk(text, sources, folder, **options):
    return write_folder(
        plan_of(text, sources), sources, StatisticsCache(), folder, lambda *_: None, **options
    )


@pytest.mark.parametrize("text", [TASK_ARITHMETIC, DARE], ids=["span", "mask"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_live_and_on_disk_are_one(text, dtype, tmp_path):
    sources = make_sources(torch.bfloat16)
    text += f"out_dtype: {dtype}"
    model = Net(make_tensors(0), dtype=getattr(torch, dtype))
    digest = live(text, sources, model)
    assert on_disk(text, sources, tmp_path / "one") == digest
    assert on_disk(text, sources, tmp_path / "many", shard_bytes=300) == digest
    state = model.state_dict()
    for folder in ("one", "many"):
        written = open_checkpoint(tmp_path / folder)
        assert digest_of(written) == digest
        assert set(written.names()) == set(state)
        assert all(torch.equal(written.read(name), state[name]) for name in state)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1


def test_digest_tells_merges_apart_and_knows_them_again():
    sources, model = make_sources(), Net(make_tensors(0))
    first = live(TASK_ARITHMETIC, sources, model)
    other = live(TASK_ARITHMETIC.replace("0.25", "0.2501"), sources, model)
    assert first != other
    assert live(TASK_ARITHMETIC, sources, model) == first


def test_tensors_stay_where_they_are():
    model = Net(make_tensors(0))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    live(TASK_ARITHMETIC, make_sources(), model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert torch.equal(model.inv_freq, torch.ones(3))


def untied_sources(**changes):
    return make_sources(**{m: {"lm_head.weight": None} for m in ("base", "a", "b")}, **changes)


def test_tied_tensors_are_written_once_and_seen_by_both_names():
    tensors = {name: t for name, t in make_tensors(0).items() if name != "lm_head.weight"}
    model = Net(tensors, tied={"lm_head.weight": "model.embed_tokens.weight"})
    live(TASK_ARITHMETIC, untied_sources(), model)
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert state["lm_head.weight"].abs().sum() > 0


def test_names_that_are_one_tensor_in_the_model_must_agree_in_the_merge():
    tensors = {name: t for name, t in make_tensors(0).items() if name != "lm_head.weight"}
    model = Net(tensors, tied={"lm_head.weight": "model.embed_tokens.weight"})
    same = {
        label: {"lm_head.weight": make_tensors(seed)["model.embed_tokens.weight"]}
        for seed, label in enumerate(("base", "a", "b"))
    }
    live(TASK_ARITHMETIC, make_sources(**same), model)
    with pytest.raises(MergeError, match=r"model\.embed_tokens\.weight: the model ties it"):
        live(TASK_ARITHMETIC, make_sources(), model)


def test_a_model_of_other_tensors_is_left_alone():
    tensors = make_tensors(0)
    head = tensors.pop("lm_head.weight")
    model = Net({**tensors, "lm_heads.weight": head, "score.weight": torch.zeros(2, 6)})
    with pytest.raises(MergeError) as caught:
        live(TASK_ARITHMETIC, make_sources(), model)
    assert str(caught.value).splitlines() == [
        "lm_head.weight: the live model has no such tensor. Did you mean lm_heads.weight?",
        "lm_heads.weight: the live model has it, and the models that are merged do not.",
        "score.weight: the live model has it, and the models that are merged do not.",
    ]
    assert all(not tensor.any() for tensor in model.state_dict().values())


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_a_model_of_another_dtype_or_shape_is_left_alone(wrong):
    tensors = make_tensors(0)
    dtype = torch.float16 if wrong == "dtype" else torch.float32
    if wrong == "shape":
        tensors = {name: torch.zeros(2) for name in tensors}
    model = Net(tensors, dtype=dtype)
    with pytest.raises(MergeError, match=r"lm_head\.weight: the live model has .*, the merge \(16"):
        live(TASK_ARITHMETIC, make_sources(), model)
    assert all(not tensor.any() for tensor in model.state_dict().values())


def test_a_failed_merge_leaves_no_folder(tmp_path):
    bad = {"lm_head.weight": None, "model.norm.weight": torch.full((6,), torch.nan)}
    sources = untied_sources()
    sources["a"] = make_sources(a=bad)["a"]
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: a holds NaN"):
        on_disk(TASK_ARITHMETIC, sources, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
