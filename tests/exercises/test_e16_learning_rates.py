"""e16, the table of a sweep over learning rates: means and ranges over seeds, and no
comparison of what does not compare. Difficulty 3, 30 minutes and 30 of running; 3
points here, 7 for the text.
"""

import copy

import torch

METHODS, RATES, SEEDS = ("sdft", "sft"), (1e-4, 3e-4, 1e-3), (0, 1, 2)


def sweep(rng):
    """18 runs in any order."""
    runs = [
        {"method": method, "lr": lr, "seed": seed, "kl": 0.5}
        for method in METHODS for lr in RATES for seed in SEEDS
    ]  # fmt: skip
    for run in runs:
        new, prior = torch.rand(2, generator=rng).tolist()
        run["new"], run["prior"] = round(new, 4), round(prior, 4)
    order = torch.randperm(len(runs), generator=rng).tolist()
    return [runs[i] for i in order]


def truth(runs, key):
    """{(method, lr): the values over seeds} as plain loops."""
    table = {}
    for method in METHODS:
        for lr in RATES:
            table[method, lr] = [
                run[key] for run in runs if run["method"] == method and run["lr"] == lr
            ]
    return table


def near(a, b):
    return len(a) == len(b) and all(
        abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True)
    )


def summary(values):
    return sum(values) / len(values), min(values), max(values)


def table_of(impl, runs):
    rows = impl.extra.summarize(runs)
    keys = {"method", "lr", "seeds", "new", "prior"}
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and keys <= row.keys() for row in rows
    )
    assert good, f"a list of dicts with {', '.join(sorted(keys))}; yours is {rows!r}"
    return rows


def test_one_line_for_each_method_and_rate_in_order(impl, rng):
    runs = sweep(rng)
    rows = table_of(impl, runs)
    keys = [(row["method"], row["lr"]) for row in rows]
    right = [(method, lr) for method in METHODS for lr in RATES]
    assert len(keys) == len(right) and set(keys) == set(right), (
        f"there are {len(keys)} lines, {keys}: there should be "
        "one for each (method, lr)"
    )
    assert keys == right, f"the lines are sorted by method, then lr; yours are {keys}"
    seeds = [row["seeds"] for row in rows]
    assert seeds == [3] * 6, f"seeds says how many there are: 3, yours are {seeds}"
    rows = table_of(impl, [run for run in runs if run["seed"] != 1])
    seeds = [row["seeds"] for row in rows]
    assert seeds == [2] * 6, f"seeds says how many there are: 2, yours are {seeds}"


def test_mean_and_range_over_the_seeds(impl, rng):
    runs = sweep(rng)
    rows = table_of(impl, runs)
    for row in rows:
        for key, other in (("new", "prior"), ("prior", "new")):
            values = truth(runs, key)[row["method"], row["lr"]]
            mixed = truth(runs, other)[row["method"], row["lr"]]
            yours, right = tuple(row[key]), summary(values)
            if len(yours) == 3 and near(yours, right):
                continue
            assert len(yours) == 3, f"{key} is (mean, lowest, highest), yours {yours}"
            assert not near(yours, summary(mixed)), "new and prior are exchanged"
            swapped = near(yours, (right[0], right[2], right[1]))
            assert not swapped, "yours has the highest before the lowest"
            mean = right[0]
            spread = (sum((x - mean) ** 2 for x in values) / 2) ** 0.5
            n_spread = (sum((x - mean) ** 2 for x in values) / 3) ** 0.5
            for far in (spread, n_spread):
                for pair in ((mean - far, mean + far), (far, far)):
                    assert not near(yours[1:], pair), (
                        "yours has a standard deviation in the place of lowest and "
                        "highest: of three seeds, show the range"
                    )
            middle = sorted(values)[1]
            assert not near(yours[:1], (middle,)), (
                "yours is the middle value of the seeds; the mean is asked"
            )
            assert not near(yours[:1], (max(values),)), (
                "yours is the best seed, not the mean of all: that is how papers fool "
                "themselves"
            )
            raise AssertionError(
                f"{key} of {row['method']}, {row['lr']} is {yours}, it should be "
                f"{right}"
            )


def refused(impl, runs, message):
    try:
        impl.extra.summarize(runs)
    except NotImplementedError:
        raise
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(
            f"{message}; it ends with {error!r}, and should with ValueError"
        ) from None
    raise AssertionError(f"{message}, and nothing is raised: ValueError")


def test_a_run_that_comes_twice_is_refused(impl, rng):
    runs = sweep(rng)
    again = {**runs[0], "new": 0.5}
    refused(impl, [*runs, again], "a (method, lr, seed) comes twice")


def test_a_seed_that_is_missing_is_refused(impl, rng):
    refused(impl, sweep(rng)[1:], "a run is missing, so lines have not the same seeds")
    runs = sweep(rng)
    runs[0]["seed"] = 7
    refused(impl, runs, "two lines have as many seeds, but others (0, 1, 2 and 7)")


def test_other_numbers_of_seeds_and_rates_work(impl, rng):
    runs = [run for run in sweep(rng) if run["seed"] < 2 and run["method"] == "sft"]
    rows = table_of(impl, runs)
    seeds = [row["seeds"] for row in rows]
    assert seeds == [2, 2, 2], f"two seeds, one method, three rates: {seeds}"
    for row in rows:
        right = summary(truth(runs, "new")["sft", row["lr"]])
        assert near(tuple(row["new"]), right), f"{row['new']} should be {right}"


def test_what_it_is_given_stays_as_it_is(impl, rng):
    runs = sweep(rng)
    before = copy.deepcopy(runs)
    impl.extra.summarize(runs)
    assert runs == before, "summarize changes the runs that it is given"
