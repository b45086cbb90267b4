"""When freed memory goes back to the system."""

from types import SimpleNamespace

from rlhf_fast.recipes import heap


def test_memory_is_given_back_after_growth_by_a_quarter(monkeypatch):
    """The step after memory was given back says anew what is usual."""
    memory, given = SimpleNamespace(rss=0), []
    monkeypatch.setattr(heap.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
    monkeypatch.setattr(heap, "give_back_memory", lambda: given.append(memory.rss))
    of_run = heap.Heap()
    for megabytes in (1000, 1240, 1260, 1100, 1370, 1380, 900):
        memory.rss = megabytes << 20
        of_run.after_step()
    assert given == [1260 << 20, 1380 << 20]
