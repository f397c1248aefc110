"""Lines with level, rank and time: of rank 0 on the screen, of every rank in a file of its own."""

import logging
import re

import pytest

from gcvit.errors import Preempted, UserError
from gcvit.runtime.log import LOGGER, log_to

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


@pytest.mark.parametrize("rank", [0, 12])
def test_rank_0_logs_to_the_screen_and_every_rank_to_its_file(tmp_path, capsys, rank):
    logger = logging.getLogger("gcvit.training.trainer")
    for start in ("first", "second"):  # a resume adds to the file
        with log_to(tmp_path / "logs", rank):
            logger.info(f"{start} start")
            logger.warning("a shard is slow")
            logger.debug("too much detail")
        logger.info("after the end")
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name == f"rank_{rank:05d}.log"
    lines = path.read_text().splitlines()
    shown = [f"rank {rank} INFO: first start", f"rank {rank} WARNING: a shard is slow"]
    shown += [f"rank {rank} INFO: second start", f"rank {rank} WARNING: a shard is slow"]
    assert [re.sub(f"^{TIME} ", "", line) for line in lines] == shown
    assert all(re.match(TIME, line) for line in lines)
    assert capsys.readouterr().err.splitlines() == (lines if rank == 0 else [])


def test_a_handler_of_the_root_logger_does_not_repeat_lines(caplog, capsys):
    """Libraries add one; here it is pytest's."""
    with log_to(None, 0):
        logging.getLogger("gcvit.training").warning("once")
    assert caplog.messages == []
    assert capsys.readouterr().err.count("once") == 1


def test_everything_is_as_before_in_the_end(tmp_path):
    before = (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate)
    with pytest.raises(ZeroDivisionError), log_to(tmp_path, 0):
        raise ZeroDivisionError
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "has_traceback"),
    [(UserError("too many samples are corrupt"), False), (Preempted(), False), (KeyError("bug"), True)],
)
def test_the_error_that_ends_a_rank_is_in_its_file_alone(tmp_path, capsys, rank, error, has_traceback):
    with pytest.raises(type(error)), log_to(tmp_path, rank):
        raise error
    first, *trace = (tmp_path / f"rank_{rank:05d}.log").read_text().splitlines()
    assert first.endswith(f"rank {rank} ERROR: {error}")
    assert bool(trace) == has_traceback
    assert capsys.readouterr().err == ""


def test_a_rank_without_a_file_is_silent(capsys):
    with log_to(None, 1):
        logging.getLogger("gcvit.training").warning("nobody reads this")
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_an_error_of_this_rank(tmp_path):
    (tmp_path / "logs").write_text("no folder")
    with (
        pytest.raises(UserError, match=r"cannot write the log: got .*rank_00003\.log \(File exists\)") as refused,
        log_to(tmp_path / "logs", 3),
    ):
        pass
    assert refused.value.rank_local
