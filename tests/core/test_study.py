"""Studies: intervals, verdicts that can come out either way, and results that are kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import Counted, Phased, Tiny

from polrl import Budget, Criterion, Study
from polrl.core.catalog import fingerprint
from polrl.core.errors import KnobError, PolrlError, UnknownNameError
from polrl.core.study import Interval, StudyResult, keep_result

FEW = settings(deadline=None, max_examples=60)
FIGURES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


def study(criteria=(), **changes):
    return Study(
        **{
            "claim": "A larger gain gives a larger score.",
            "learner": Counted,
            "arms": {"small": {"gain": 1.0}, "large": {"gain": 3.0}, "walk": {"learner": Phased, "first_steps": 2}},
            "criteria": criteria,
            "smoke": Budget(seeds=1, settings={"device": "cpu"}, steps=2, arms=("small", "large")),
            "fast": Budget(seeds=4, settings={"device": "cpu"}, steps=5, arms=("small", "large")),
            "full": Budget(seeds=2, settings={"device": "cpu"}),
            **changes,
        }
    )


LARGER = Criterion("larger", "the larger gain scores higher", plus=("large", "score"), minus=("small", "score"))
SMALLER = Criterion("smaller", "the smaller gain scores higher", plus=("small", "score"), minus=("large", "score"))


# ---- intervals ---------------------------------------------------------------------------------------------------------


@FEW
@given(FIGURES)
def test_an_interval_is_students(values):
    interval = Interval.of(values)
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-9:
        known = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((known.low, known.high), rel=1e-9, abs=1e-9)
    else:
        assert interval.high - interval.low < 1e-6


@FEW
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=6), st.floats(-5, 5))
def test_a_verdict_is_the_paired_interval_and_shown_only_if_all_of_it_lies_above(pairs, above):
    criterion = Criterion("c", "s", plus=("large", "score"), minus=("small", "score"), above=above)
    rows = [
        {"arm": arm, "seed": seed, "score": value}
        for seed, pair in enumerate(pairs)
        for arm, value in zip(("large", "small"), pair, strict=True)
    ]
    (verdict,) = study([criterion]).judge(rows)
    differences = [a - b for a, b in pairs]
    assert verdict.values == differences
    assert verdict.shown == (verdict.interval.low > above)
    if np.std(differences) > 1e-6:
        known = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
        assert (verdict.interval.low, verdict.interval.high) == pytest.approx(
            (known.low, known.high), rel=1e-6, abs=1e-9
        )
        if abs(known.low - above) > 1e-6:
            assert verdict.shown == (known.low > above)


def test_a_criterion_with_two_bounds_is_shown_only_between_them():
    rows = [{"arm": "large", "seed": s, "score": v} for s, v in enumerate((0.9, 1.0, 1.1))]
    inside, tight = (Criterion("c", "s", plus=("large", "score"), above=0.5, below=b) for b in (1.5, 1.1))
    assert [v.shown for v in study([inside, tight]).judge(rows)] == [True, False]
    assert "between 0.5 and 1.5" in str(study([inside]).judge(rows)[0])


def test_a_criterion_with_an_upper_bound_alone_is_open_below():
    rows = [{"arm": "large", "seed": s, "score": v} for s, v in enumerate((-0.1, 0.0, 0.1))]
    under, plain = Criterion("c", "s", plus=("large", "score"), below=0.5), Criterion("c", "s", plus=("large", "score"))
    verdicts = study([under, plain]).judge(rows)
    assert [v.shown for v in verdicts] == [True, False]
    assert "must lie below 0.5" in str(verdicts[0]) and "must lie above 0;" in str(verdicts[1])


def test_of_several_arms_the_one_with_the_highest_mean_is_taken():
    scores = {"small": (1.0, 2.0), "large": (5.0, 0.0), "walk": (1.0, 1.0)}
    rows = [{"arm": a, "seed": s, "score": v} for a, pair in scores.items() for s, v in enumerate(pair)]
    criterion = Criterion("c", "s", plus=(("small", "large"), "score"), minus=("walk", "score"))
    (verdict,) = study([criterion]).judge(rows)
    assert verdict.values == [4.0, -1.0] and verdict.arms == "large against walk"
    rows[2]["score"] = math.nan  # an arm that failed is no best arm
    assert study([criterion]).judge(rows)[0].arms == "small against walk"
    with pytest.raises(UnknownNameError, match="unknown arm 'larg'"):
        study([Criterion("c", "s", plus=(("small", "larg"), "score"))])


def test_one_seed_shows_nothing():
    (verdict,) = study([LARGER]).judge([{"arm": a, "seed": 0, "score": s} for a, s in (("large", 9.0), ("small", 1.0))])
    assert not verdict.shown and verdict.interval == Interval(8.0, -math.inf, math.inf)
    assert "one seed" in str(verdict) and str(verdict).startswith("NOT SHOWN")


def test_figures_without_spread_are_judged_by_their_mean():
    rows = [{"arm": a, "seed": s, "score": v} for s in range(3) for a, v in (("large", 2.0), ("small", 1.0))]
    assert [v.shown for v in study([LARGER, SMALLER]).judge(rows)] == [True, False]
    exact = Criterion("exact", "s", plus=("large", "score"), above=2.0)
    assert not study([exact]).judge(rows)[0].shown, "above means above"


def test_figures_that_are_not_numbers_show_nothing():
    rows = [{"arm": a, "seed": s, "score": math.nan} for s in range(3) for a in ("large", "small")]
    assert not study([LARGER]).judge(rows)[0].shown


def test_seeds_are_paired_by_their_number():
    rows = [{"arm": "large", "seed": s, "score": float(10 * s)} for s in (2, 0, 1)]
    rows += [{"arm": "small", "seed": s, "score": float(10 * s - 1)} for s in (1, 2, 0, 7)]
    (verdict,) = study([LARGER]).judge(rows)
    assert verdict.values == [1.0, 1.0, 1.0] and verdict.shown


# ---- declarations --------------------------------------------------------------------------------------------------------


def test_a_criterion_about_an_unknown_arm_is_refused_at_once():
    for criterion in (
        Criterion("c", "s", plus=("larg", "score")),
        Criterion("c", "s", ("large", "x"), minus=("smal", "x")),
    ):
        with pytest.raises(UnknownNameError, match="unknown arm .* did you mean"):
            study([criterion])


def test_a_criterion_about_an_unknown_metric_is_refused_when_judged():
    wrong = Criterion("c", "s", plus=("large", "scroe"))
    with pytest.raises(UnknownNameError, match="unknown metric 'scroe'; did you mean score"):
        study([wrong]).run("smoke", n_jobs=1)


def test_settings_are_checked_before_anything_is_trained():
    with pytest.raises(KnobError, match="gain must be"):
        study(arms={"small": {}, "large": {"gain": 99.0}, "walk": {}}).jobs("fast")
    with pytest.raises(UnknownNameError, match="unknown mode 'fats'; did you mean fast"):
        study().jobs("fats")


def test_the_jobs_of_a_study_are_all_arms_by_all_seeds():
    jobs = study().jobs("full")
    assert [(job.labels["arm"], job.labels["seed"]) for job in jobs] == [
        (arm, seed) for arm in ("small", "large", "walk") for seed in (0, 1)
    ]
    assert [job.learner for job in jobs] == [Counted] * 4 + [Phased] * 2
    assert jobs[-1].settings == {"device": "cpu", "first_steps": 2, "seed": 1}
    assert {job.labels["arm"] for job in study().jobs("smoke")} == {"small", "large"}


# ---- running ---------------------------------------------------------------------------------------------------------------


def test_a_study_comes_out_either_way(tmp_path):
    result = study([LARGER, SMALLER]).run("fast", n_jobs=1, folder=tmp_path)
    assert [verdict.shown for verdict in result.verdicts] == [True, False]
    larger, smaller = result.verdicts
    assert larger.interval.low > 0 > smaller.interval.high and larger.values == [-v for v in smaller.values]
    table = result.verdict_table()
    assert table["verdict"].tolist() == ["shown", "not shown"] and table.index.tolist() == ["larger", "smaller"]
    assert str(larger).startswith("SHOWN: the larger gain scores higher") and "4 seeds" in str(larger)
    assert result.slug == "tiny:Counted" and result.mode == "fast"
    assert result.fingerprint == fingerprint(Path(__file__).with_name("tiny.py"))


def test_criteria_whose_arms_were_not_run_are_left_out():
    walk = Criterion("walk", "the walk is far", plus=("walk", "distance"))
    result = study([LARGER, walk]).run("smoke", n_jobs=1)
    assert [verdict.name for verdict in result.verdicts] == ["larger"]


def test_the_figure_at_the_end_of_a_phase_can_be_asked_for():
    criterion = Criterion("phase", "s", plus=("walk", "distance@first"), above=-1.0)
    budget = Budget(seeds=3, settings={"device": "cpu"}, arms=("walk",))
    result = study([criterion], fast=budget).run("fast", n_jobs=1)
    assert result.verdicts[0].values == [row["distance@first"] for row in result.measures]


def test_the_table_shows_mean_and_interval_by_arm():
    result = study([LARGER]).run("fast", n_jobs=1)
    table = result.table(["score"])
    scores = [row["score"] for row in result.measures if row["arm"] == "small"]
    assert table.loc["small", "score"] == str(Interval.of(scores)) and table.index.tolist() == ["small", "large"]
    assert set(result.table().columns) == {"score", "threads"}
    with pytest.raises(UnknownNameError, match="did you mean score"):
        result.table(["scores"])


def test_arms_with_different_metrics_share_a_table():
    rows = [{"arm": "a", "seed": 0, "x": 1.0}, {"arm": "b", "seed": 0, "y": 2.0}]
    table = StudyResult("s", "c", "fast", "", {}, rows, [], []).table()
    assert table.loc["a", "y"] == "" and table.loc["b", "y"] == "2.000 (one seed)"


def test_a_study_that_was_stopped_resumes(tmp_path, monkeypatch):
    log = tmp_path / "log"
    budget = Budget(seeds=3, settings={"device": "cpu", "log": str(log)}, steps=3, arms=("small", "large"))
    made = study([LARGER], fast=budget)
    first = made.run("fast", n_jobs=1, folder=tmp_path / "kept")
    assert len(log.read_text().splitlines()) == 6
    next((tmp_path / "kept").iterdir()).unlink()
    again = made.run("fast", n_jobs=1, folder=tmp_path / "kept")
    assert len(log.read_text().splitlines()) == 7
    assert again.measures == first.measures and again.verdicts == first.verdicts


def test_the_full_form_keeps_its_trainings_by_itself(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *a, **k: str(tmp_path))
    made = study(full=Budget(seeds=2, settings={"device": "cpu"}, steps=2, arms=("small",)))
    made.run("full", n_jobs=1)
    assert len(list(tmp_path.rglob("*.json"))) == 2


# ---- results ---------------------------------------------------------------------------------------------------------------


def test_a_result_survives_its_json():
    result = study([LARGER]).run("fast", n_jobs=1)
    assert StudyResult.from_json(result.to_json()) == result
    one = study([LARGER]).run("smoke", n_jobs=1)
    assert StudyResult.from_json(one.to_json()) == one


def test_only_the_full_forms_result_is_kept(tmp_path):
    made = study([LARGER], full=Budget(seeds=3, settings={"device": "cpu"}, steps=3, arms=("small", "large")))
    with pytest.raises(PolrlError, match="only the full form's result is kept, this is the fast form's"):
        keep_result(made.run("fast", n_jobs=1), tmp_path)
    assert list(tmp_path.iterdir()) == []
    full = made.run("full", n_jobs=1, folder=tmp_path / "kept")
    path = keep_result(full, tmp_path / "results")
    assert path.name.endswith(".json") and StudyResult.from_json(path.read_text()) == full


def test_a_baseline_may_be_another_learner():
    made = study([], smoke=Budget(seeds=1, settings={"device": "cpu"}, steps=2, arms=("tiny", "small")), arms={
        "tiny": {"learner": Tiny}, "small": {}, "large": {}, "walk": {}})  # fmt: skip
    assert [set(row) for row in made.run("smoke", n_jobs=1).measures] == [
        {"arm", "seed", "size"},
        {"arm", "seed", "score", "threads"},
    ]
