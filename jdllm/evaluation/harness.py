"""jdllm as an lm-eval model: importing this module registers it, running it is lm-eval's command.

import lm_eval, jdllm.evaluation.harness
lm_eval.simple_evaluate(model="jdllm", model_args="model=bundled,mesh=1x1", tasks=["gsm8k"])

python -m jdllm.evaluation.harness run --model jdllm --model_args model=bundled --tasks gsm8k
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  a registry that holds our name alone would hide lm-eval's own
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from jdllm.completion import Completion
from jdllm.decode import DecodeConfig
from jdllm.evaluation.lm_arguments import (
    batch_rows,
    check_device,
    given_names,
    model_name,
    overlay,
    read_gen_kwargs,
    read_settings,
)
from jdllm.evaluation.records import Group, Record, Scored
from jdllm.evaluation.settings import check_verifier
from jdllm.evaluation.speed import Cost, Speed
from jdllm.llm import LLM
from jdllm.runtime import processes
from jdllm.runtime.files import alone
from jdllm.runtime.journal import FINISHED, Journal, digest, number_repeats
from jdllm.runtime.progress import Bar
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.score.scoring import Likelihood
from jdllm.tokenizer import render, unmarked

DEFAULT_LENGTH = 128  # columns, where neither the settings, the model nor the request names any
INSTRUCT = (
    "the model has a chat template: likelihoods are made for base models, and those of an "
    "instruction-tuned one are often poor; tasks that generate text score it better"
)
RAW = (
    "the model has a chat template, but prompts go to it as they are: --apply_chat_template (in "
    "Python apply_chat_template=True) frames them, chat=false says that this is meant"
)
SAME = "repeats of a document are equal without chance: set temperature, in gen_kwargs or decode.*"
log = logging.getLogger("jdllm")


class JdllmLM(LM):
    """An LLM under lm-eval's interface; `records` and `scored` grow with every call.

    As for every model of lm-eval, a prompt goes to the model as it is; lm-eval frames it where it
    is asked to (apply_chat_template=True). Where `chat` is true a prompt that lm-eval did not frame
    becomes one user message, if the model has a chat template. Contexts whose continuations are
    scored are never framed here.
    """

    def __init__(
        self,
        model: str | LLM | None = None,
        *,
        pretrained: str | None = None,
        decode: DecodeConfig | None = None,
        likelihood: LikelihoodConfig | None = None,
        mesh: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        batch_size: int | str = 32,
        chat: bool | None = None,
        length: int | None = None,
        progress: bool = True,
        leave: bool = True,
        journal: Journal | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        verifier: str | None = None,
        allow_unknown: Sequence[str] = (),
        adapter: str | None = None,
        **settings: Any,
    ):
        """Loads `model` (see LLM.load; `pretrained` is lm-eval's word for it), or wraps an LLM.

        `decode` and `likelihood` are set as they are, or by words such as decode.threshold=0.8
        among lm-eval's model_args; decode settings given so (in `decode`: what is not the default)
        win over a request's gen_kwargs, and `length` over its max_gen_toks. What is finished goes
        into `journal` (a folder, or a Journal) and is not done again. `verifier` is the causal
        model that decode.rule=verify asks, `adapter` a LoRA adapter; an LLM has its own.
        `allow_unknown` are keys of a published config.json to ignore (as text: separated by
        spaces). A `batch_size` of auto is 32 rows, or `max_batch_size` if less. ValueError for an
        unknown word, OSError where another run holds the folder.
        """
        super().__init__()
        check_device(device)
        self.batch_size = batch_rows(batch_size, max_batch_size)
        bases = {"decode": decode or DecodeConfig(), "likelihood": likelihood or LikelihoodConfig()}
        chosen = read_settings(settings, bases)
        self.decode: DecodeConfig = chosen["decode"]
        self._given = given_names(bases["decode"], settings)
        self.likelihood: LikelihoodConfig = chosen["likelihood"]
        named = model_name(model, pretrained)
        if isinstance(named, LLM):
            self.llm = named
        else:
            check_verifier(verifier, [self.decode])
            self.llm = LLM.load(named, mesh, dtype, seed, verifier, allow_unknown, adapter=adapter)
        self.tokenizer: Any = self.llm.tokenizer
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, and the prompts of a task are text")
        self.chat, self.length, self.progress, self.leave = chat, length, progress, leave
        self._lock = contextlib.ExitStack()  # held as long as this object, or the process
        if isinstance(journal, str):
            self._lock.enter_context(alone(Path(journal)))
            journal = Journal(Path(journal) / FINISHED)
        self.journal = journal
        self.records: list[Record] = []
        self.scored: list[Scored] = []
        self.gen_kwargs: dict[str, dict[str, Any]] = {}  # by task: decode settings it changed
        self._used: dict[DecodeConfig, None] = {}
        self._rendered, self._said = set[str](), set[str]()

    @property
    def likelihoods(self) -> list[Likelihood]:
        """What was scored, in order, without the texts."""
        return [scored.score for scored in self.scored]

    @property
    def speed(self) -> Speed:
        """What the records cost."""
        return Speed.of((record.completion, record.cost) for record in self.records)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model's; see jdllm.store.fingerprint."""
        return self.llm.fingerprint()

    @functools.cached_property
    def verifier_fingerprint(self) -> str | None:
        """The verifier's, where there is one."""
        return self.llm.verifier_fingerprint()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions in the order of `requests`, each cut at the first of its `until` strings.

        A request's gen_kwargs change the decode settings but for those that were given to this
        object; its max_gen_toks counts only where neither they nor the model say how long a
        completion is. A request that comes several times (lm-eval's repeats) draws anew each time.
        ValueError for gen_kwargs without a meaning.
        """
        if not requests:
            return []
        found: dict[int, Record] = {}
        rows = self.encode([request.args[0] for request in requests])
        groups = self.groups(requests)
        keys, samples = self._keys(requests, rows, groups)
        if any(samples[i] and not group.decode.draws for group, g in groups.items() for i in g):
            self._say(SAME)
        bar = self._bar(requests, disable_tqdm)
        for i, request in enumerate(requests):
            if keys[i] in (self.journal or ()):
                found[i] = self._remember(request, samples[i], keys[i])
                bar.update(1)
        with bar:
            for group, members in groups.items():
                members = [i for i in members if i not in found]
                for batch in self.llm.stream(
                    [rows[i] for i in members],
                    group.decode,
                    batch_size=self.batch_size,
                    stop=group.stop,
                    samples=[samples[i] for i in members],
                ):
                    cost = Cost.of(batch)
                    chosen = [members[row] for row in batch.index]
                    for i, completion in zip(chosen, batch.completions, strict=True):
                        request = requests[i]
                        found[i] = Record(
                            request.task_name, request.doc_id, samples[i],
                            unmarked(request.args[0]), completion, cost,
                        )  # fmt: skip
                    self._keep({keys[i]: dataclasses.asdict(found[i]) for i in chosen})
                    for i in chosen:
                        self.cache_hook.add_partial(
                            "generate_until", requests[i].args, found[i].completion.text
                        )
                    bar.update(len(chosen))
        self.records += [found[i] for i in range(len(requests))]
        return [found[i].completion.text or "" for i in range(len(requests))]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether it is the greedy one (where that is checked).

        An estimate of a bound, by `likelihood`; `likelihoods` has the standard errors. Text is
        split as in LLaDA's harness: a context's trailing spaces go to the continuation, and both
        are tokenised together.
        """
        scores = self._score(requests, self.pairs(requests), disable_tqdm)
        return [(score.value, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text) of whole texts.

        A text longer than the model's canvas is cut into windows of that length, which are scored
        each by itself and added up.
        """
        scores = self._score(requests, self.pairs(requests), disable_tqdm)
        return [score.value for score in scores]

    def pairs(self, requests: Sequence[Instance]) -> list[list[tuple[list[int], list[int]]]]:
        """Token ids of what is scored for each request: a continuation, or a text's windows."""
        window = self.llm.config.max_length - 1  # room for an eos
        found = []
        for request in requests:
            if len(request.args) == 2:
                found.append([self._encode_pair(*request.args)])
            else:
                row = self.llm.encode([request.args[0]], chat=False)[0]
                found.append([([], row[i : i + window]) for i in range(0, len(row), window)])
        return found

    def _score(
        self, requests: list[Instance], pairs: list[list[tuple]], hidden: bool
    ) -> list[Likelihood]:
        """The summed score of each request's pairs; what the journal holds is not scored again."""
        if self.tokenizer.chat_template and requests:
            log.warning(INSTRUCT)
        model = self.fingerprint if self.journal is not None else None
        facts = {"model": model, "likelihood": dataclasses.asdict(self.likelihood)}
        keys, _ = number_repeats(
            [
                digest(facts | {"task": r.task_name, "doc_id": r.doc_id, "pairs": p})
                for r, p in zip(requests, pairs, strict=True)
            ]
        )
        journal: Any = self.journal or {}
        found = {i: Likelihood(**journal[k]["score"]) for i, k in enumerate(keys) if k in journal}
        owners = [i for i, split in enumerate(pairs) for _ in split if i not in found]
        collected: dict[int, list[Likelihood]] = {i: [] for i in owners}
        bar = self._bar(requests, hidden)
        bar.update(len(found))

        def finished(number: int, score: Likelihood) -> None:
            i = owners[number]
            collected[i].append(score)
            if len(collected[i]) < len(pairs[i]):
                return
            found[i] = functools.reduce(Likelihood.__add__, collected[i])
            facts = {"task": requests[i].task_name, "doc_id": requests[i].doc_id}
            self._keep({keys[i]: facts | {"score": dataclasses.asdict(found[i])}})
            bar.update(1)

        with bar:
            missing = [pair for i, split in enumerate(pairs) for pair in split if i not in found]
            self.llm.loglikelihood(
                missing, self.likelihood, batch_size=self.batch_size, finished=finished
            )
        scores = [found[i] for i in range(len(requests))]
        self.scored += [
            Scored(request.task_name, request.doc_id, request.args[-1], one)
            for request, one in zip(requests, scores, strict=True)
        ]
        return scores

    def _keep(self, finished: dict[str, dict[str, Any]]) -> None:
        """Appends records to the journal, if there is one; equal requests are kept once."""
        if self.journal is not None:
            self.journal.append({"key": key} | facts for key, facts in finished.items())

    def _remember(self, request: Instance, sample: int, key: str) -> Record:
        """What the journal holds under `key`, of an earlier run or of this one."""
        kept: Any = self.journal and self.journal[key]
        completion, cost = Completion(**kept["completion"]), Cost(**kept["cost"])
        prompt = unmarked(request.args[0])
        return Record(request.task_name, request.doc_id, sample, prompt, completion, cost)

    def _keys(
        self, requests: Sequence[Instance], rows: Sequence[list[int]], groups: dict[Group, list]
    ) -> tuple[list[str], list[int]]:
        """What tells each request from any other, in any run, and its number among its repeats."""
        owner = {i: group for group, members in groups.items() for i in members}
        model = self.fingerprint if self.journal is not None else None
        facts = [
            {
                "model": model,
                "decode": dataclasses.asdict(owner[i].decode),
                "stop": owner[i].stop,
                "task": request.task_name,
                "doc_id": request.doc_id,
                "prompt": rows[i],
            }
            for i, request in enumerate(requests)
        ]
        for i, fact in enumerate(facts):
            if model and owner[i].decode.rule == "verify":
                fact["verifier"] = self.verifier_fingerprint
            if model and owner[i].decode.exit.aims:
                fact["maps"] = self.llm.maps.digest(owner[i].decode.exit)
        return number_repeats([digest(fact) for fact in facts])

    def _bar(self, requests: Sequence[Instance], hidden: bool) -> Bar:
        """A progress bar over requests, shown by one of several processes."""
        name = requests[0].task_name if requests else None
        hidden = hidden or not self.progress or not processes.is_main()
        return Bar(total=len(requests), desc=name, unit="prompt", disable=hidden, leave=self.leave)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval files cached requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for lm-eval's records; None where prompts are not framed."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            name = chat_template if isinstance(chat_template, str) else "default"
            template = template.get(name)
        return template if chat_template or self.chat else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages; without a generation prompt the last message is left open."""
        text = render(self.tokenizer, chat_history, open_last=not add_generation_prompt)
        self._rendered.add(text)
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say about the model: framing, and settings that were used."""
        framed = bool(self._rendered) or self.frames
        return {"chat": framed, "decode": [dataclasses.asdict(used) for used in self._used]}

    @property
    def frames(self) -> bool:
        """Whether prompts that lm-eval did not frame are framed here."""
        return bool(self.chat and self.tokenizer.chat_template)

    def groups(self, requests: Sequence[Instance]) -> dict[Group, list[int]]:
        """Indices of the requests that may share a batch."""
        groups: dict[Group, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._group(request), []).append(i)
        self._used |= dict.fromkeys(group.decode for group in groups)
        return groups

    def _group(self, request: Instance) -> Group:
        """A request's stop strings and settings; what of its gen_kwargs gives way is said once."""
        asked = read_gen_kwargs(request.arguments[1])
        config, used, remarks = overlay(self.decode, self._given, asked)
        own = self.llm.defaults.gen_length
        open_length = not config.gen_length and not self.length
        if open_length and asked.length and own and own != asked.length:
            remarks.append(
                f"the model's own length of {own} wins over gen_kwargs: max_gen_toks="
                f"{asked.length}; gen_length= there, or decode.gen_length=, sets another"
            )
        for remark in remarks:
            self._say(remark)
        if used:
            self.gen_kwargs.setdefault(request.task_name or "", {}).update(used)
        return Group(asked.stop, self._resolve(asked.length or DEFAULT_LENGTH, config))

    def _say(self, remark: str) -> None:
        """Logs a warning, once."""
        if remark not in self._said:
            self._said.add(remark)
            log.warning(remark)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation."""
        bare = context.rstrip()
        whole, prefix = self.llm.encode([context + continuation, bare], chat=False)
        return prefix, whole[len(prefix) :]

    def _resolve(self, length: int, config: DecodeConfig | None = None) -> DecodeConfig:
        """Settings with `length`, filled up to whole blocks, as the last resort."""
        config = config or self.decode
        usual = self.llm.defaults.block_length or 32
        block = config.block_length or min(usual, length)
        return self.llm.resolve(config, gen_length=self.length or -(-length // block) * block)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts, framed where that is asked for and lm-eval has not done it."""
        if self.frames:
            prompts = [
                prompt
                if prompt in self._rendered
                else render(self.tokenizer, [{"role": "user", "content": prompt}])
                for prompt in prompts
            ]
        elif self.chat is None and self.tokenizer.chat_template and not self._rendered:
            self._say(RAW)
        return self.llm.encode(prompts, chat=False)


register_model("jdllm")(JdllmLM)  # as a decorator it would hide the signature from type checkers
