"""scikit-learn's own checks of an estimator, on numbers that are written as texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from conftest import Export
from sklearn.utils.estimator_checks import parametrize_with_checks

from bbt_accel import PromptClassifier

TINY: dict[str, str] = {}


class OnNumbers(PromptClassifier):
    """Texts are the numbers of a row; the backbone is a tiny one, so that it learns nothing."""

    def fit(self, X: Any, y: Any) -> Self:
        self.backbone = TINY["roberta"]
        try:
            return super().fit(written(X), y)
        finally:
            self.backbone = "demo"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = (
            False,
            True,
        )  # so that scikit-learn checks more than the interface
        return tags

    def predict_proba(self, X: Any) -> Any:
        return super().predict_proba(written(X))


def written(X: Any) -> list[str]:
    return [" ".join(f"{value:.3g}" for value in np.atleast_1d(row)) for row in np.asarray(X)]


NUMBERS = "checks numbers as numbers, of which this estimator sees texts"
UNPICKLED = "a fitted estimator holds an engine: save and load take the place of pickle"
LEARNS = "the tiny backbone is random, so that nothing is learned from its states"
EXPECTED = {
    "check_n_features_in": NUMBERS,
    "check_n_features_in_after_fitting": NUMBERS,
    "check_estimators_empty_data_messages": NUMBERS,
    "check_estimators_nan_inf": NUMBERS,
    "check_estimator_sparse_tag": NUMBERS,
    "check_estimator_sparse_array": NUMBERS,
    "check_estimator_sparse_matrix": NUMBERS,
    "check_fit1d": NUMBERS,
    "check_fit2d_predict1d": NUMBERS,
    "check_estimators_pickle": UNPICKLED,
    "check_classifiers_train": LEARNS,
}
"""What scikit-learn checks and this estimator does not do, and why."""


@pytest.fixture(autouse=True, scope="module")
def backbone(tiny: Export, shared: Path) -> Iterator[None]:
    tiny("roberta")
    TINY["roberta"] = str(shared / "roberta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBT_ACCEL_CACHE", str(shared / "cache"))
        yield


@pytest.mark.slow
@parametrize_with_checks(
    [
        OnNumbers(
            engine="ort",
            precision="fp32",
            budget=1,
            readout="calibrated",
            n_prompt_tokens=5,
            threads=1,
        )
    ],
    expected_failed_checks=lambda _: EXPECTED,
)
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
