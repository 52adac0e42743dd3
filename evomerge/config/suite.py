"""SuiteConfig: the lm-eval tasks, their settings, and the items of search, confirm and report."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from evomerge.config.strict import StrictModel, one_or_many

ItemRole = Literal["search", "confirm", "report"]
"""What items are for: choosing candidates, confirming the winner, reporting it.

No item has two roles.
"""

ROLES: tuple[ItemRole, ...] = get_args(ItemRole)


class TaskConfig(StrictModel):
    """One lm-eval task and the metric that counts."""

    task: str
    """Name of a task (groups and tags are written out as their tasks)."""

    metric: str
    """lm-eval's metric, e.g. `acc`, `acc_norm`, or with its filter: `exact_match,strict-match`."""

    weight: float = Field(1.0, ge=0.0)
    """Share of this task in a weighted mean."""

    num_fewshot: int | None = Field(None, ge=0)
    """Examples shown before each question; None is the task's own number."""

    generation: dict[str, JsonValue] = Field(default_factory=dict)
    """Changes to the task's generation arguments, e.g. `{max_gen_toks: 64}`."""

    higher_is_better: bool | None = None
    """None asks lm-eval; say it for metrics that lm-eval does not know."""

    floor: float | None = None
    """Score of a guess, for floor-normalised objectives; None is 0."""


class RoleItems(StrictModel):
    """Items of one role, per task. A bare number is a count."""

    count: int | None = Field(None, ge=0)
    """Items per task; None is all that are left, 0 is none."""

    split: str | None = None
    """Data split the items come from; None is the task's own evaluation split."""

    @model_validator(mode="before")
    @classmethod
    def _from_count(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value


class ItemsConfig(StrictModel):
    """Which items have which role: from splits of their own, or from one without overlap."""

    search: RoleItems = RoleItems(count=200)
    confirm: RoleItems = RoleItems(count=400)
    report: RoleItems = RoleItems(count=0)

    seed: int = 0
    """Seed of the draw."""

    stratify: str | None = None
    """Field of the documents whose values keep their proportions in every draw.

    None draws from all alike.
    """


class ChatConfig(StrictModel):
    """How prompts are dressed, as lm-eval's options of the same names."""

    apply_chat_template: bool | str = False
    """Use the tokenizer's chat template (true), or the one of this name."""

    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    """Few-shot examples as turns of a conversation; needs `apply_chat_template`."""

    enable_thinking: bool | None = None
    """The chat template's thinking switch; None leaves it to the template."""

    think_end_token: str | None = None
    """Text that ends the thinking; only what follows is judged. `enable_thinking` needs it."""


class SuiteConfig(StrictModel):
    """Everything that decides what a model is asked and how its answers are counted."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    include_path: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = ()
    """Folder or folders with task YAML files, read before lm-eval's own tasks."""

    items: ItemsConfig = ItemsConfig()
    leakage: Literal["refuse", "allow"] = "refuse"
    """What becomes of a suite whose scores would flatter: items that two roles share, or a winner
    chosen on the split on which a well-known benchmark's scores are published.

    Where it is allowed, status, exported recipes and model cards say what leaks.
    """

    chat: ChatConfig = ChatConfig()
    batch_size: int = Field(16, ge=1)
    """Rows per forward pass. A fixed number: batches are part of the numbers.

    Packed rows are longer; as many go into a batch as have the tokens of this many plain ones.
    """

    chunks: int = Field(4, ge=1)
    """Parts into which an evaluation is cut; idle workers share them.

    Part of the numbers, as batches never cross a chunk.
    """

    max_length: int | None = Field(None, ge=2)
    """Longest prompt in tokens; None is what the model's config says."""

    loglikelihood: Literal["auto", "packed", "lm_eval"] = "auto"
    """How the choices of an item are compared.

    `packed` reads an item's context once, all its choices after it, and the beginning that a task's
    items share once for all. `lm_eval` reads the context again with each choice, as lm-eval does.
    `auto` is packed where the model, tried on a few rows, gives the same numbers up to rounding,
    and lm_eval where it does not; a study goes on only with the one that it began with. Items that
    do not fit into a model's sliding window are read as by lm_eval in any case.
    """

    time_limit: float | None = Field(None, gt=0)
    """Longest time in seconds that a model may take over one chunk; None is no limit.

    A candidate that takes longer, say because its answers never end, is a failed trial. Base,
    parents and baselines are held to it too, and a study needs their scores: leave them room.
    Merging and the first preparation of prompts do not count. May change when a study is resumed.
    """

    add_bos_token: bool | None = None
    """Put a begin-of-text token before prompts; None leaves it to the tokenizer."""

    attn_implementation: str | None = None
    """transformers' attention, e.g. `sdpa`, `eager`, `flash_attention_2`; None is its default."""

    fewshot_seed: int = 1234
    """Seed of the draw of few-shot examples (lm-eval's default is 1234)."""

    @model_validator(mode="after")
    def _consistent(self) -> "SuiteConfig":
        names = [task.task for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task {twice[0]!r} stands twice. Keep one entry for each task.")
        if self.items.search.count == 0:
            raise ValueError("items.search is 0. A search needs items to score candidates on.")
        if not any(task.weight > 0 for task in self.tasks):
            raise ValueError("every task has weight 0. Give at least one task a positive weight.")
        if self.chat.enable_thinking and self.chat.think_end_token is None:
            raise ValueError(
                "chat.enable_thinking needs chat.think_end_token. Write the text that ends the "
                "thinking, e.g. </think>."
            )
        if self.chat.fewshot_as_multiturn and not self.chat.apply_chat_template:
            raise ValueError(
                "chat.fewshot_as_multiturn needs chat.apply_chat_template. Set that to true."
            )
        return self
