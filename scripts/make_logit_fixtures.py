"""Writes tests/fixtures/logits.npz: the logits of transformers for the cases of tests/support/logit_cases.py.

    PYTHONPATH=tests/support python scripts/make_logit_fixtures.py

The file holds no weights, because tests/support/random_weights.py makes them from their names. Run this script again
after changing a case.
"""

import json
from pathlib import Path

import numpy as np
import transformers
from logit_cases import CASES, NUM_TOKENS, TOKENS_SEED, VOCAB_SIZE, transformers_logits, transformers_model

TARGET = Path(__file__).parent.parent / "tests" / "fixtures" / "logits.npz"
POSITIONS = (0, 1, 8, 9, 17, 39)  # the positions whose logits are stored: around the window and the original length


def main() -> None:
    """Computes and writes all cases."""
    tokens = np.random.default_rng(TOKENS_SEED).integers(0, VOCAB_SIZE, NUM_TOKENS)
    models = {name: transformers_model(name) for name in CASES}
    configs = {name: model.config.to_dict() for name, model in models.items()}
    logits = np.stack([transformers_logits(model, tokens)[list(POSITIONS)] for model in models.values()])
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        TARGET,
        tokens=tokens,
        positions=np.array(POSITIONS),
        configs=np.frombuffer(json.dumps(configs).encode(), np.uint8),
        logits=logits,
    )
    print(f"{TARGET}: {len(CASES)} cases, {TARGET.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
