"""The study of engines starts its runs as it says."""

from __future__ import annotations


def test_a_single_process_drives_one_card(monkeypatch):
    """The reference of eight ranks; with more cards in sight a run is refused."""
    from results.zero.run import environment

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert environment(1)["CUDA_VISIBLE_DEVICES"] == "4" and environment(4)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment(1)["CUDA_VISIBLE_DEVICES"] == "0" and "CUDA_VISIBLE_DEVICES" not in environment(8)
