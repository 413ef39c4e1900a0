"""Answers many prompts of mixed lengths in one process: memory must stay flat, programs few, and answers in order.

    python scripts/long_run.py --prompts 2000

Prompts are pieces of a text (default: the demo's), in batches of one to four. Every batch has its own lengths, and each
hundredth prompt is asked a second time alone: its answer must be the same. Prints peak memory and compiled programs
as it goes, and exits with 1 if the answers differ, or if memory or programs still grow in the second half.
"""

import argparse
import random
import resource
import sys
from pathlib import Path

import jax
from tqdm import tqdm

import hshare_jax
from hshare_jax import HShare, HShareSettings

GROWTH = 1.05  # of memory and programs in the second half; a rare length may still come for the first time
SETTINGS = HShareSettings(num_sinks=4, num_critical=40, num_recent=20, min_length=0)


def main() -> int:
    """Runs all prompts. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "demo_prompt.txt")
    options = parser.parse_args()
    model = hshare_jax.load_model(options.model)
    assert model.tokenizer is not None
    tokens = model.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    rng, compiled, told, answers = random.Random(0), [0], [], {}

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        return hshare_jax.generate(model, prompts, method=HShare(SETTINGS), max_new_tokens=6).tokens

    jax.monitoring.register_event_duration_secs_listener(count)
    with tqdm(total=options.prompts, unit="prompt", disable=None) as bar:
        done = 0
        while done < options.prompts:
            batch = []
            for _ in range(min(rng.randint(1, 4), options.prompts - done)):
                length = int(2 ** rng.uniform(0, 8))
                start = rng.randrange(len(tokens) - length)
                batch.append(tokens[start : start + length])
            for prompt, found in zip(batch, answer(batch), strict=True):
                if done % 100 == 0:
                    answers[done] = prompt, found
                done += 1
            bar.update(len(batch))
            if done >= len(told) * options.prompts / 20:
                told.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, compiled[0]))
                tqdm.write(f"{done:6} prompts  {told[-1][0]:8.0f} MiB  {told[-1][1]:5} programs")
    differ = [number for number, (prompt, found) in answers.items() if answer([prompt])[0] != found]
    middle, end = told[len(told) // 2], told[-1]
    grows = any(last > GROWTH * before for last, before in zip(end, middle, strict=True))
    print(f"{len(answers)} prompts asked twice, {len(differ)} with another answer; {'grows' if grows else 'flat'}")
    return 1 if differ or grows else 0


if __name__ == "__main__":
    sys.exit(main())
