"""Checks of a row's tokens: its length, what is learned of it, how its characters are spelled."""

from typing import TYPE_CHECKING

from athanor.chat.conversation import Conversation
from athanor.chat.templates import RenderedText
from athanor.chat.tokens import appends_end_token, supervise
from athanor.compute.arrays import TokenizedText
from athanor.config.schema import Config
from athanor.prepare.characters import Spelling
from athanor.prepare.checks import Fault

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding


class TokenChecks:
    """The checks of rows that are tokenized; `spelling` collects characters without a token."""

    def __init__(self, cfg: Config, tokenizer: "TokenizerWrapper", end: int) -> None:
        """Prepare for rows that are trained on with this config; `end` ends answers."""
        self.spelling = Spelling(tokenizer)
        self._spelled_share = cfg.data.spelled_share
        self._tokenizer = tokenizer
        self._limit = cfg.train.max_seq_length
        self._mask_prompt = cfg.train.mask_prompt
        self._end = end
        self._ends = tuple(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)))
        self._closes = appends_end_token(tokenizer)

    def check(
        self,
        row: Conversation,
        rendered: list[RenderedText],
        encodings: list["Encoding"],
        faults: list[Fault],
    ) -> tuple[int, int, int, bool]:
        """Return a row's tokens, supervised tokens, cut tokens, and True if an answer's end is cut.

        Tokens and cut tokens are those of its longest text. Adds what is wrong to `faults`.
        """
        limit, whole = self._limit, rendered[-1]
        if whole.answer_starts is None:
            # The same as of `supervise`, without a list for each text.
            closed = self._closes or whole.text.endswith(self._ends)
            length = len(encodings[-1]) + (not closed)
            supervised, end_cut = max(min(length, limit) - 1, 0), False
        else:
            texts = [
                supervise(text, encoding, self._tokenizer, self._mask_prompt, self._end)
                for text, encoding in zip(rendered, encodings, strict=True)
            ]
            length = max(map(len, texts))
            spans = [span for text in texts for span in text.answer_spans]
            # The first token of a text is never predicted.
            counted = (behind - max(first, 1) for first, behind in spans if behind <= limit)
            if self._mask_prompt:
                supervised = sum(counted)
            elif whole.context_starts:
                supervised = sum(texts[-1].truncate(limit).supervised[1:])
            else:
                supervised = min(length, limit) - 1
            end_cut = any(behind > limit for _, behind in spans)
            self._check_turns(row, texts, faults)
        cut = max(length - limit, 0)
        if not supervised:
            text = "none of its tokens is supervised"
            if cut:
                text = f"no complete answer in the first {limit} of {length} tokens"
            faults.append(Fault("nothing_to_learn", text))
        elif cut:
            text = f"{cut} of {length} tokens are cut" + ", with the end of an answer" * end_cut
            faults.append(Fault("end_cut" if end_cut else "too_long", text))
        return length, supervised, cut, end_cut

    def check_spelling(self, text: str, faults: list[Fault]) -> None:
        """Add a fault where a large share of a text's characters takes several tokens each."""
        if spelled := self.spelling.spelled(text):
            self.spelling.rows.update(sorted(spelled))  # equal runs write equal reports
            share = sum(map(text.count, spelled)) / len(text)
            if share > self._spelled_share:
                shown = "".join(sorted(spelled)[:10])
                reason = f"{share:.0%} of its characters take several tokens each: {shown}"
                faults.append(Fault("spelled_characters", reason))

    def _check_turns(
        self, row: Conversation, texts: list[TokenizedText], faults: list[Fault]
    ) -> None:
        if self._mask_prompt:
            answers = sum(turn.learned for turn in row.turns)
            if missed := answers - sum(len(text.answer_spans) for text in texts):
                reason = f"{missed} answers are not learned: the chat template rewrites them"
                faults.append(Fault("answer_not_found", reason))
        if not all(text.prompts_match for text in texts):
            reason = "the template's prompt for an answer differs from its text of the conversation"
            faults.append(Fault("asked_otherwise", reason))
