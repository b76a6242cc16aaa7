import os
import threading

from fellrec.functional.secrets import redact


def test_variables_may_come_and_go_in_another_thread(monkeypatch):
    """As MLflow's telemetry does it: a log message is written all the same, without the secret."""
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    is_over = threading.Event()

    def change() -> None:
        while not is_over.is_set():
            for number in range(50):
                os.environ[f"ANOTHER_TOKEN_{number}"] = "x"
            for number in range(50):
                del os.environ[f"ANOTHER_TOKEN_{number}"]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {redact("it is hunter2hunter2") for _ in range(300)} == {"it is ***"}
    finally:
        is_over.set()
        thread.join()
