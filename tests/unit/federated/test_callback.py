from typing import Any

import pytest

from fellrec.federated.callback import HOOKS, FederatedCallback


def test_a_hook_that_the_loop_cannot_call_is_refused_at_class_creation() -> None:
    needed = r"Old.on_round_end\(self, loop, record\): needed is on_round_end\(self, record\)"
    with pytest.raises(TypeError, match=needed):

        class Old(FederatedCallback):
            def on_round_end(self, loop: Any, record: Any) -> None: ...

    class Fine(FederatedCallback):
        def on_round_end(self, *records: Any) -> None: ...

        def on_step_end(self, loss: float, more: int = 0) -> None: ...

        @staticmethod
        def on_fit_end(result: Any) -> None: ...

    assert issubclass(Fine, FederatedCallback)


def test_the_hooks_are_those_of_the_design_and_one_for_the_progress_of_an_evaluation():
    pairs = [
        f"on_{what}_{when}" for what in ("fit", "round", "client", "aggregate", "evaluate") for when in ("start", "end")
    ]
    assert set(HOOKS) == {*pairs, "on_step_end", "on_exception", "on_users_scored"}


def test_known_hooks_helpers_and_attributes_are_accepted():
    class Fine(FederatedCallback):
        on_disk = True

        def on_round_end(self, record): ...
        def once(self): ...

    assert Fine().state_dict() == {}
    assert Fine().on_fit_end(None) is None


@pytest.mark.parametrize("wrap", [lambda f: f, staticmethod, classmethod])
def test_a_misspelt_hook_is_refused_when_the_class_is_made(wrap):
    with pytest.raises(TypeError, match=r"Wrong: unknown hook 'on_round_strat'; choose from: on_round_start, "):
        type("Wrong", (FederatedCallback,), {"on_round_strat": wrap(lambda *a: None)})


def test_subclasses_of_callbacks_are_checked_too():
    class Fine(FederatedCallback): ...

    with pytest.raises(TypeError, match="on_epoch_end"):
        type("Wrong", (Fine,), {"on_epoch_end": lambda self: None})
