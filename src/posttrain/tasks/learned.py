"""Graders that are models: a reward model, and a language model that is asked to judge."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt, PrivateAttr, field_validator

from posttrain.errors import ModelError
from posttrain.models.source import ModelSource, refuse_other_tokens
from posttrain.tasks.grader import Grader, checked, failed
from posttrain.text import Grade, Message, Problem, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template


class RewardModelGrader(Grader, kind="reward_model"):
    """The score of a reward model, read at the last token of prompt and answer as they were sampled.

    The model must have the policy's tokenizer: it reads the sampled tokens themselves.
    """

    model: ModelSource
    """The reward model: a stage's (`{stage: reward}`), a folder or a hub name."""
    micro_tokens: PositiveInt = 4096
    """Tokens computed at a time."""

    _lm: Any = PrivateAttr(None)

    @property
    def open_scale(self) -> bool:
        return True

    def check(self) -> None:
        self.model.check()

    def check_policy(self, policy: ModelSource) -> None:
        refuse_other_tokens("reward model", self.model, policy)

    def prepare(self, template: "Template") -> None:
        """Raises ModelError where the reward model reads other tokens than the policy writes."""
        if self._lm is not None:
            return
        from posttrain.models.load import refuse_other_tokenizer
        from posttrain.tuners.load import load_scalar

        refuse_other_tokenizer("reward model", self.model, template.tokenizer)
        loaded = load_scalar(self.model).lm
        loaded.requires_grad_(False)
        self._lm = loaded

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        import torch

        from posttrain.batch import Sequences

        longest = math.inf if self._lm.context is None else self._lm.context
        fitting = Sequences.of([(one.tokens, one.sampled) for one in samples if len(one.tokens) <= longest])
        with torch.no_grad():
            scores = iter(self._lm.scores_of_many(fitting, self.micro_tokens).tolist())
        long = failed(f"prompt and answer are longer than the reward model's context of {longest}")
        return [checked(Grade(next(scores))) if len(one.tokens) <= longest else long for one in samples]

    def grade(self, problem: Problem, text: str) -> Grade:
        return failed("a reward model grades samples, not texts")


class JudgeGrader(Grader, kind="judge"):
    """A language model is asked for a mark; the reward is the expected mark, brought to [-1, 1].

    arXiv 2309.00267 (d-RLAIF): sum of mark times its probability, among the marks only, as the answer's next tokens; then
    (mark - middle) / half of the range.
    """

    model: ModelSource
    """The judge."""
    question: str = (
        "Here is a request and a response to it.\n\nRequest: {prompt}\n\nResponse: {answer}\n\n"
        "How good is the response, from {lowest} (bad) to {highest} (very good)? Answer with the number only."
    )
    """What the judge is asked, with {prompt}, {answer}, {lowest} and {highest} in it."""
    lowest: int = 1
    """The lowest mark."""
    highest: int = 10
    """The highest mark."""
    micro_tokens: PositiveInt = 4096
    """Tokens computed at a time."""

    _judge: Any = PrivateAttr(None)

    @field_validator("question")
    @classmethod
    def _asks_about_the_answer(cls, value: str) -> str:
        try:
            shown = value.format(prompt="a", answer="the answer", lowest=1, highest=2)
        except (KeyError, IndexError, ValueError) as error:
            known = "{prompt}, {answer}, {lowest} and {highest}"
            raise ValueError(f"the question cannot be filled in ({error}); it may hold {known}") from None
        if "the answer" not in shown:
            raise ValueError("the question does not show the answer; put {answer} into it")
        return value

    @property
    def open_scale(self) -> bool:
        return True

    def check(self) -> None:
        self.model.check()
        if self.lowest >= self.highest:
            raise ModelError(f"judge: lowest {self.lowest} is not below highest {self.highest}")

    def prepare(self, template: "Template") -> None:
        if self._judge is None:
            from posttrain.data.render import Template as Rendering
            from posttrain.tuners.load import load

            loaded = load(self.model)
            loaded.lm.requires_grad_(False)
            self._judge = (loaded.lm, Rendering(loaded.tokenizer))

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        import torch

        from posttrain import losses
        from posttrain.batch import Sequences

        lm, template = self._judge
        marks = list(range(self.lowest, self.highest + 1))
        answers = [[*template.tokenizer(str(mark), add_special_tokens=False)["input_ids"], template.end_id] for mark in marks]
        grades: list[Grade | None] = []
        rows = []
        for one in samples:
            prompt = self._asked(one, template)
            room = math.inf if lm.context is None else lm.context - max(map(len, answers))
            if isinstance(prompt, Grade) or len(prompt) > room:
                grades.append(prompt if isinstance(prompt, Grade) else failed("the question is longer than the judge's context"))
                continue
            grades.append(None)
            rows += [(prompt + said, [False] * len(prompt) + [True] * len(said)) for said in answers]
        if not rows:
            return [grade for grade in grades if grade is not None]
        seqs = Sequences.of(rows)
        with torch.no_grad():
            logp = lm.logprobs_of_many(seqs, self.micro_tokens).cpu()
        shares = losses.sequence_sums(logp.double(), seqs.owner, seqs.count).reshape(-1, len(marks)).softmax(-1)
        expected = iter((shares @ torch.tensor(marks, dtype=torch.float64)).tolist())
        return [grade if grade is not None else self._graded(next(expected)) for grade in grades]

    def _asked(self, one: Sample, template: Any) -> list[int] | Grade:
        """The tokens of the question about an answer, or why it cannot be asked."""
        if (control := template.control_in(one.text)) is not None:
            return failed(f"the answer spells the judge's control token {control}")  # and could go on as the judge
        asked = "\n".join(message.content for message in one.problem.prompt)
        question = self.question.format(prompt=asked, answer=one.text, lowest=self.lowest, highest=self.highest)
        return list(template.prompt([Message("user", question)]))

    def _graded(self, mark: float) -> Grade:
        middle, half = (self.lowest + self.highest) / 2, (self.highest - self.lowest) / 2
        return checked(Grade((mark - middle) / half, {"mark": mark}))

    def grade(self, problem: Problem, text: str) -> Grade:
        return self.grade_all([Sample(problem, 0, (), (), (), "end", text)])[0]
