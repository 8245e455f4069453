"""The harness compares only what is the same work. Its arithmetic, on made-up measurements; speed itself is never a test."""

import pytest

from benchmarks import __main__ as harness

TRL_LOSSES = [8.0, 7.5, 7.0, 6.5]


def run(seconds, losses, peak=100.0):
    return {"seconds": [9.0, 9.0, seconds, seconds], "tokens": [10, 10, 100, 100], "losses": losses, "peak": peak}


def table(monkeypatch, ours, mixed=TRL_LOSSES, slow=False):
    """What `compare` prints, where our float32 losses are `ours` and our mixed ones `mixed`; slow: without bfloat16."""
    made = {
        ("posttrain", "mixed"): run(1.0, mixed, 60.0), ("posttrain", None): run(2.0, ours, 50.0),
        ("trl", None): run(3.0, TRL_LOSSES), ("trl", "free"): run(2.5, TRL_LOSSES), ("trl", "exact"): run(4.0, TRL_LOSSES),
    }  # fmt: skip

    def measured(_module, function, options):
        kind = options.get("dtype") or ("exact" if "bf16" in options else "free" if "padding_free" in options else None)
        return made[function, kind]

    monkeypatch.setattr(harness, "measured", measured)
    monkeypatch.setattr(harness, "bfloat16_is_slow", lambda: slow)
    lines = []
    found = harness.compare(harness.sft("4k", 4), 2, lines.append)
    return found, "\n".join(lines)


def test_ratios_are_of_the_steps_after_the_first_two_and_of_trls_default_and_best(monkeypatch):
    found, text = table(monkeypatch, TRL_LOSSES)
    assert found["agree"]
    assert "| posttrain mixed | 100 | 60 | 3.00 | 2.50 | 0.60 |" in text
    assert "| posttrain float32 | 50 | 50 | 1.50 | 1.25 | 0.50 |" in text
    assert "| TRL padding-free (TRL's best) | 40 | 100 |" in text


@pytest.mark.parametrize(
    ("ours", "mixed"),
    [([8.0, 7.5, 7.0, 6.5002], TRL_LOSSES), (TRL_LOSSES, [8.0, 7.5, 7.01, 6.5]), ([8.0, 7.5, 7.0, float("nan")], TRL_LOSSES)],
)
def test_no_ratio_is_shown_where_the_losses_differ(monkeypatch, ours, mixed):
    found, text = table(monkeypatch, ours, mixed)
    assert not found["agree"]
    assert "No ratio is shown" in text
    assert "| posttrain mixed | 100 | 60 |  |  |  |" in text


def test_where_bfloat16_is_slow_everything_is_compared_in_float32(monkeypatch):
    found, text = table(monkeypatch, TRL_LOSSES, slow=True)
    assert found["agree"]
    assert "mixed" not in text
    assert "| posttrain float32 | 50 | 50 | 2.00 | 2.00 | 0.50 |" in text
    assert "| TRL padding-free float32 (TRL's best) | 25 | 100 |" in text
    assert not table(monkeypatch, [8.0, 7.5, 7.0, 6.5002], slow=True)[0]["agree"]
    assert [each.name for each in harness.grpo("4k", 5, "").engines if not each.halves] == [
        "posttrain float32", "TRL default, float32", "TRL without checkpointing, float32",
    ]  # fmt: skip


def test_the_useful_operations_of_a_step_are_counted_by_hand():
    shape = harness.SHAPES["4k"]
    matrices = 384 * 384 * 2 + 2 * 384 * 128 + 3 * 384 * 1024
    assert shape.layer_weights == 6 * matrices
    one = 3 * (2 * 6 * matrices * 10 + 6 * 4 * 384 * 10 * 10 / 2 + 2 * 384 * 4096 * 4)
    assert shape.flops(10, 4, 100) == one


@pytest.mark.parametrize(
    ("found", "agree"),
    [
        ({"loss": 0.0, "gradient": 9e-7, "ours": 9e-7, "theirs": 1e-7}, True),
        ({"loss": 0.0, "gradient": 9e-6, "ours": 4e-6, "theirs": 8e-6}, True),  # float32 itself is no nearer
        ({"loss": 0.0, "gradient": 3e-6, "ours": 3e-6, "theirs": 1e-6}, False),
        ({"loss": 0.0, "gradient": 3e-5, "ours": 1e-5, "theirs": 2e-5}, False),
        ({"loss": 2e-6, "gradient": 1e-7, "ours": 1e-7, "theirs": 1e-7}, False),
    ],
)
def test_grpo_agrees_by_its_gradient_or_by_being_as_near_to_float64_as_the_other(monkeypatch, found, agree):
    monkeypatch.setattr(harness, "measured", lambda *_: found)
    runs = {"posttrain mixed": [{"mismatch": 1e-3}]}
    assert harness.agreement(harness.WORKS["grpo-4k"], runs)[0] is agree


@pytest.mark.parametrize(
    ("ours", "mixed", "default", "agree"),
    [
        (0.693, 0.694, 0.691, True),  # in bf16 both are off, ours by less
        (0.693, 0.690, 0.692, False),  # ours by three times as much
        (0.69302, 0.693, 0.691, False),
    ],
)
def test_pairs_agree_in_float32_and_are_no_farther_from_it_in_bf16_than_twice_the_other(ours, mixed, default, agree):
    work = harness.WORKS["dpo-4k"]
    losses = {"posttrain float32": ours, "posttrain mixed": mixed, "TRL default": default, work.exact: 0.693}
    assert harness.agreement(work, {name: [{"losses": [loss]}] for name, loss in losses.items()})[0] is agree
