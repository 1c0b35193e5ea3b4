"""What the README shows, runs."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_as_they_stand(base):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block.replace("runs/r1_zero/model", base), names)
    np.testing.assert_allclose(names["advantages"], [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    assert names["scores"].total[0] > 1.5
    assert names["scores"].parts["right"].tolist() == [1.0]
    assert names["drawn"].completion_ids.shape == names["log_probs"].shape == (8, 48)


def test_what_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"\]\(([a-z][^):]*)\)", README):
        assert (ROOT / path).exists(), path
