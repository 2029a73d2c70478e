"""An engine process with faults that prompts call up: a program that tests give to the supervisor.

The first word of a raw prompt chooses: FAIL (one sequence fails at its second token), CRASH (the
loop itself fails), HANG (a step does not end).
"""

import sys
import time

from tokenizers import pre_tokenizers

from optiq.engine.sequence import SequenceState
from optiq.server import worker
from optiq.server.messages import Begin

SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())  # as tests.tiny numbers them
FAIL = tuple(SYMBOLS.index(letter) for letter in "FAIL")


class FaultyWorker(worker.Worker):
    """Fails as a whole."""

    fault = ""

    def _obey(self, order):
        if isinstance(order, Begin):
            prompt = getattr(order.job, "prompt", "")
            if isinstance(prompt, str) and prompt in {"CRASH", "HANG"}:
                self.fault = prompt
        super()._obey(order)

    def _step(self):
        if self.fault == "CRASH":
            raise RuntimeError("the loop is broken")
        if self.fault == "HANG":
            time.sleep(1000)
        super()._step()


take = SequenceState.take


def failing(self, tokens, logprobs):
    """Take tokens, unless this is a sequence that fails."""
    if self.request.tokens[:4] == FAIL and self.written > 0:
        raise ValueError("this sequence is broken")
    take(self, tokens, logprobs)


if __name__ == "__main__":
    SequenceState.take = failing
    worker.Worker = FaultyWorker
    worker.main(sys.argv[1:])
