"""The crossover measurement times the two ways that it says."""

from hf_clt.benchmark import crossover
from hf_clt.kernels import rows


def test_each_density_is_timed_both_ways(monkeypatch):
    ways = []
    use_dense = rows.use_dense

    def spy(entries, num_tokens, num_features):
        ways.append((entries.numel() / (num_tokens * num_features), use_dense(entries, num_tokens, num_features)))
        return ways[-1][1]

    monkeypatch.setattr("hf_clt.kernels.decode.use_dense", spy)
    table = crossover.measure_crossover(16, 200, 2, 8, repeats=1)
    assert [row["density"] for row in table] == list(crossover.DENSITIES)
    assert {way for _, way in ways} == {True, False}
    assert {density for density, _ in ways} == {max(1, round(d * 200)) / 200 for d in crossover.DENSITIES}
    for row in table:
        assert row["gathered"] > 0 and row["product"] > 0 and row["ratio"] == row["product"] / row["gathered"]
    assert rows.DENSE_ABOVE == 0.08  # as it was
