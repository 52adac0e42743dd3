"""Live weights: overwritten in place, whole or not at all, under the names of the files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels import dispatch
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import Merger, merged_tensors
from evomerge.merging.folder import Destination, write_folder
from evomerge.merging.live import LiveWeights, write_live, write_together
from evomerge.merging.places import live_views
from evomerge.merging.plan import make_plan
from tests.families import make_family
from tests.merging.small import TASK_ARITHMETIC, make_sources, make_tensors, plan_of

DARE = TASK_ARITHMETIC.replace("task_arithmetic", "dare_ties") + "parameters: {density: 0.5}\n"
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


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


def merged_digest(text, sources):
    tensors = merged_tensors(plan_of(text, sources), sources, StatisticsCache())
    return digest_of(MemorySource(tensors))


def family_sources(label, **changed):
    """Sources `base`, `a`, `b` of a family, by the names on disk, with tensors put over them."""
    sources = {}
    for seed, name in enumerate(("base", "a", "b")):
        sources[name] = MemorySource({**stored(make_family(label, seed)), **changed}, name)
    return sources


def stored(model):
    """The tensors that transformers would save, by name."""
    from transformers.core_model_loading import revert_weight_conversion

    state = revert_weight_conversion(model, model.state_dict())
    tied = model.all_tied_weights_keys
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}


@pytest.mark.parametrize("text", [TASK_ARITHMETIC, DARE], ids=["span", "mask"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_live_and_on_disk_are_one(text, dtype, tmp_path):
    sources = make_sources(torch.bfloat16)
    text += f"out_dtype: {dtype}"
    model = Net(make_tensors(0), dtype=getattr(torch, dtype))
    digest = live(text, sources, model)
    state = model.state_dict()
    for to in (Destination(tmp_path / "one"), Destination(tmp_path / "many", shard_bytes=300)):
        plan = plan_of(text, sources)
        assert write_folder(plan, sources, StatisticsCache(), to, lambda *_: None) == digest
        written = open_checkpoint(to.folder)
        assert digest_of(written) == digest
        assert set(written.names()) == set(state)
        assert all(torch.equal(written.read(name), state[name]) for name in state)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1


def test_digest_tells_merges_apart_and_knows_them_again():
    sources, model = make_sources(), Net(make_tensors(0))
    first = live(TASK_ARITHMETIC, sources, model)
    other = live(TASK_ARITHMETIC.replace("0.25", "0.2501"), sources, model)
    assert first != other
    assert live(TASK_ARITHMETIC, sources, model) == first == merged_digest(TASK_ARITHMETIC, sources)


def test_tensors_stay_where_they_are():
    model = Net(make_tensors(0))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    live(TASK_ARITHMETIC, make_sources(), model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert torch.equal(model.inv_freq, torch.ones(3))


def test_tied_tensors_are_written_once_and_seen_by_both_names():
    tensors = {name: t for name, t in make_tensors(0).items() if name != "lm_head.weight"}
    model = Net(tensors, TIED)
    sources = make_sources(**{name: {"lm_head.weight": None} for name in ("base", "a", "b")})
    live(TASK_ARITHMETIC, sources, model)
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert state["lm_head.weight"].abs().sum() > 0


def test_names_that_are_one_tensor_in_the_model_must_agree_in_the_merge():
    tensors = {name: t for name, t in make_tensors(0).items() if name != "lm_head.weight"}
    model = Net(tensors, TIED)
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


def test_a_merge_that_is_not_finite_is_told():
    bad = {"model.norm.weight": torch.full((6,), torch.nan)}
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: a holds NaN"):
        live(TASK_ARITHMETIC, make_sources(a=bad), Net(make_tensors(0)))


@pytest.mark.parametrize("label", ["mixtral", "qwen3_moe"])
def test_experts_stored_apart_are_views_of_one_live_tensor(label):
    model = make_family(label, 0)
    tensors = stored(model)
    views = live_views(model, tensors)
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    fused = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 3}
    for number, view in enumerate(views.values()):
        view.fill_(number)
    for tensor in fused.values():
        assert len(tensor.unique()) in (4, 8)  # four experts, with gate and up in one tensor


def test_experts_stored_fused_go_where_they_are():
    model, other = make_family("mixtral", 0), make_family("mixtral", 1)
    views = live_views(model, other.state_dict())
    for name, tensor in other.state_dict().items():
        views[name].copy_(tensor)
    assert all(torch.equal(views[name], tensor) for name, tensor in other.state_dict().items())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize(
    ("label", "old", "new"),
    [
        ("gpt2", "transformer.", ""),
        ("llama_tied", "model.", ""),
        ("gpt_neox", "embed_out", "lm_head"),
        ("mixtral", "block_sparse_moe.", "mlp."),
        ("qwen3_moe", "model.", ""),
    ],
)
def test_other_names_of_the_same_tensors_are_found_as_transformers_finds_them(
    label, old, new, tmp_path
):
    from transformers import AutoModelForCausalLM

    other, model = make_family(label, 1, tmp_path), make_family(label, 0)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace(old, new, 1): t for name, t in load_file(file).items()}
    renamed = {"lm_head.weight" if n == "head.weight" else n: t for n, t in renamed.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    views = live_views(model, renamed)
    assert set(views) == set(renamed)
    for name, tensor in renamed.items():
        views[name].copy_(tensor)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert other.config.model_type == model.config.model_type


def test_an_expert_that_is_missing_on_disk_is_told():
    gone = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    sources = family_sources("mixtral")
    for name, source in sources.items():
        tensors = {each: source.read(each) for each in source.names() if each != gone}
        sources[name] = MemorySource(tensors, name)
    model = make_family("mixtral", 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError) as caught:
        live(TASK_ARITHMETIC, sources, model)
    assert str(caught.value) == (
        "model.layers.1.mlp.experts.gate_up_proj: the live model has it, and the models that are "
        "merged do not."
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tensor_that_transformers_leaves_out_counts_in_the_digest_only():
    extra = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor([-1e9])}
    sources, model = family_sources("gpt_neox", **extra), make_family("gpt_neox", 0)
    digest = live(TASK_ARITHMETIC, sources, model)
    assert digest == merged_digest(TASK_ARITHMETIC, sources)
    assert digest != live(TASK_ARITHMETIC, family_sources("gpt_neox"), model)


def test_a_tensor_that_transformers_computes_on_loading_is_refused(monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    def mapping(model):
        sources, targets = "mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        return [WeightConverter(sources, targets, [Chunk(dim=0)])]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
    model = make_family("llama", 0)
    name = "model.layers.0.mlp.w13.weight"
    with pytest.raises(MergeError, match=rf"^{name}: transformers makes .*gate_proj.weight of it"):
        live_views(model, [name])


def test_a_stack_goes_into_a_live_model_of_its_depth(tmp_path):
    from evomerge.checkpoints.depth import with_depth
    from evomerge.checkpoints.index import read_json
    from evomerge.workers.live_model import load_live_model

    layers = [0, 1, 1, 2]
    make_family("qwen2", 0, tmp_path)
    source = open_checkpoint(tmp_path, "base")
    layout = layout_of(source.names())
    stacked = {}
    for name in source.names():
        layer = layout.layer_of(name)
        for place in [None] if layer is None else [i for i, at in enumerate(layers) if at == layer]:
            new = name.replace(f"layers.{layer}.", f"layers.{place}.")
            stacked[new] = source.read(name).clone()
    sources = {"base": MemorySource(stacked, "base")}
    recipe = parse_recipe("{merge_method: passthrough, models: [{model: base}]}")
    plan = make_plan(recipe, sources, layout_of(stacked))
    config = with_depth(read_json(tmp_path / "config.json", "base"), layers)
    model = load_live_model(tmp_path, torch.float32, None, "cpu", config)
    assert write_live(plan, sources, StatisticsCache(), model) == digest_of(sources["base"])
    assert len(model.model.layers) == 4
    assert model.config.layer_types == ["full_attention", *["sliding_attention"] * 3]


def count_launches(monkeypatch):
    sizes = []
    launch = dispatch.carry_out_all

    def counted(jobs):
        sizes.append(len(jobs))
        return launch(jobs)

    monkeypatch.setattr(dispatch, "carry_out_all", counted)
    return sizes


def test_a_candidate_is_one_launch(monkeypatch):
    sizes, sources = count_launches(monkeypatch), make_sources()
    live(TASK_ARITHMETIC, sources, Net(make_tensors(0)))
    assert [size for size in sizes if size] == [len(plan_of(TASK_ARITHMETIC, sources).jobs)]


def test_what_takes_new_memory_is_launched_in_parts(monkeypatch):
    class Computed(MemorySource):
        holds_tensors = False

    held = make_sources()
    sources = {
        name: Computed({key: source.read(key) for key in source.names()}, name)
        for name, source in held.items()
    }
    monkeypatch.setattr("evomerge.merging.live.LAUNCH_BYTES", 100)
    expected = merged_digest(TASK_ARITHMETIC, held)
    sizes, model = count_launches(monkeypatch), Net(make_tensors(0))
    assert live(TASK_ARITHMETIC, sources, model) == expected
    assert sum(sizes) == len(plan_of(TASK_ARITHMETIC, sources).jobs)
    assert len([size for size in sizes if size]) > 2


def test_places_are_looked_up_once_and_again_when_a_tensor_has_moved(monkeypatch):
    looked_up = []

    def counted(model, names):
        looked_up.append(model)
        return live_views(model, names)

    monkeypatch.setattr("evomerge.merging.live.live_views", counted)
    sources, model = make_sources(), Net(make_tensors(0))
    plan, weights = plan_of(TASK_ARITHMETIC, sources), LiveWeights(model)
    merger = Merger(sources)
    first = weights.write(plan, merger)
    assert weights.write(plan, merger) == first
    assert len(looked_up) == 1
    moved = model.get_parameter("model.embed_tokens.weight")
    moved.data = torch.zeros_like(moved)
    assert weights.write(plan, merger) == first
    assert len(looked_up) == 2
    assert digest_of(MemorySource(dict(model.state_dict()))) == first.digest


@pytest.mark.parametrize("text", [TASK_ARITHMETIC, DARE], ids=["span", "mask"])
def test_a_population_reads_its_models_once(text):
    class Counting(MemorySource):
        def read(self, name):
            read.append(name)
            return super().read(name)

    read, held = [], make_sources()
    sources = {
        name: Counting({key: source.read(key) for key in source.names()}, name)
        for name, source in held.items()
    }
    weights = ("0.25", "0.7", "-0.1")
    plans = [plan_of(text.replace("0.25", weight), sources) for weight in weights]
    models = [Net(make_tensors(0)) for _ in plans]
    written = write_together(plans, Merger(sources), [LiveWeights(model) for model in models])
    assert sorted(read) == sorted(list(make_tensors(0)) * 3)
    for weight, model, merge in zip(weights, models, written, strict=True):
        alone = merged_digest(text.replace("0.25", weight), held)
        assert digest_of(MemorySource(dict(model.state_dict()))) == merge.digest == alone


def test_a_population_of_unlike_merges_is_refused():
    sources, fewer = make_sources(), make_sources(base={"lm_head.weight": None})
    plans = [
        plan_of(TASK_ARITHMETIC, sources),
        plan_of("merge_method: passthrough\nmodels: [{model: base}]", fewer),
    ]
    weights = [LiveWeights(Net(make_tensors(0))) for _ in plans]
    with pytest.raises(MergeError, match=r"lm_head\.weight"):
        write_together(plans, Merger(sources), weights)
