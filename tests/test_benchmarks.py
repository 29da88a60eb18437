"The numbers that the benchmark's libraries compare agree"
import sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import run

@pytest.mark.parametrize('work', 'abclt')
def test_numpy_by_hand(work):
    "Loss, gradients and updates of minima are those of the formulas written out"
    results = []
    for lib in (run.Minima, run.Numpy):
        step,numbers = getattr(lib(), work)()
        results.append(numbers(step()))
    assert len(results[0])>1
    assert results[0]==pytest.approx(results[1], rel=1e-4)
