"""A run's folder: whose it is, whether it is done, and its checkpoints.

``config.json`` says whose, how long its texts may be, and which step of ``train.init_from`` it
began from; ``result.json`` is written last, so that its presence means done. ``lock`` is held by
the process that trains there. Run folders are paths of a file system: an object store has no locks
(``lm.sweep`` trains in a folder beside the one there, and copies).
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import checksums, hosts
from lm import config as configuration
from lm.command import BadInput, InUse, json_object, naming, write_atomically
from lm.model import Decoder
from lm.sharding import layout, stored_shardings

SCHEMA = 1
CHECKPOINT_SCHEMA = 2  # of what is saved beside a state; states of 1 may have no checksums
REMOVED = "removed.orbax-checkpoint-tmp"  # so that what is left of it counts as unfinished


def claim(
    workdir: Path,
    config: configuration.Config,
    force: bool = False,
    lock: contextlib.ExitStack | None = None,
) -> dict | None:
    """Makes ``workdir`` this config's own; returns the result where the run is done already.

    With ``lock``, it is this process's own too until that is closed, and what a killed one left
    unfinished is removed. Raises ``BadInput`` where the folder holds another config's run, naming
    the keys that differ, unless ``force``, which continues under the new config; and ``InUse``
    where another process trains there, naming it.
    """
    done = _finished(workdir, config, force)
    if done is None and lock is not None:
        lock.enter_context(_locked(workdir))
        done = _finished(workdir, config, force)  # whoever held the lock may have ended the run
        _remove_unfinished(workdir / "checkpoints")
    if done is None:
        path = workdir / "config.json"
        found = json_object(path) if path.exists() else {}
        wanted = {"schema": SCHEMA, "config": configuration.to_dict(config)}
        # What the run started from may be gone by the time it goes on.
        goes_on = found.get("config") == wanted["config"] and "context" in found
        wanted["context"] = found["context"] if goes_on else _made_for(config)
        # Also where ``force`` continues it under a config that says something else.
        if "init_step" in found and found["config"]["train"]["init_from"] == config.train.init_from:
            wanted["init_step"] = found["init_step"]
        (workdir / "result.json").unlink(missing_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1))
    return done


def _finished(workdir: Path, config: configuration.Config, force: bool) -> dict | None:
    path, result = workdir / "config.json", workdir / "result.json"
    if not path.exists():
        return None
    found = json_object(path).get("config")
    changed = list(configuration.differences(found, configuration.to_dict(config)))
    if changed and not force:
        raise BadInput(
            f"{workdir} holds a run of another config ({'; '.join(changed)}):"
            " use another --workdir, or --force"
        )
    return json_object(result) if result.exists() and not changed else None


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel takes back from a process that dies."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode() or "another process"  # which has not written its name yet
            raise InUse(f"{workdir}: {holder} is training there") from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise  # a file system without locks goes without
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with naming(workdir / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}, since {since},".encode())
        yield


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def check_shared(workdir: Path) -> None:
    """Raises ``BadInput`` where this host doesn't see the folder that process 0 has claimed."""
    if not (workdir / "config.json").exists():
        raise BadInput(
            f"{workdir}: {socket.gethostname()} doesn't see what process 0 wrote there; checkpoints"
            " need a folder that all hosts share (or train.checkpoint_every = -1)"
        )


def load_config(workdir: Path) -> configuration.Config:
    """The config a run folder was trained with. Raises ``BadInput`` where there is none.

    A folder with a tokenizer.json of its own, as imported weights have, reads text with that.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise BadInput(f"{workdir}: no run here (config.json is missing)")
    config = configuration.read_config(path)
    tokenizer = workdir / "tokenizer.json"
    if tokenizer.exists():
        config = configuration.replace(config, data={"tokenizer": str(tokenizer)})
    return config


def context(workdir: Path) -> int:
    """Positions that a run's model was made for, as its folder has it from the run's start.

    They are the longest of its training, of the run's that it started from, and of rotary positions
    scaled by yarn or longrope. The other kinds do not say from what length their factor counts
    (linear, ntk), or do not reach as far (llama3): theirs is the length of the training.
    """
    trained = load_config(workdir).data.seq_len
    found = json_object(workdir / "config.json").get("context", trained)
    return configuration.typed(found, int, f"{workdir / 'config.json'}: context")


def _made_for(config: configuration.Config) -> int:
    """A new run's ``context``."""
    scaling, before = config.model.rope_scaling, config.train.init_from
    known = [config.data.seq_len]
    if scaling.kind in ("yarn", "longrope"):
        known.append(int(scaling.original_positions * scaling.factor))
    if before and Path(before, "config.json").exists():
        known.append(context(Path(before)))
    return max(known)


def init_step(workdir: Path) -> int | None:
    """The step of ``train.init_from`` that a run began from; None before it has begun."""
    path = workdir / "config.json"
    found = json_object(path).get("init_step")
    return None if found is None else configuration.typed(found, int, f"{path}: init_step")


def note_init_step(workdir: Path, step: int) -> None:
    """Makes it what ``init_step`` returns."""
    path = workdir / "config.json"
    write_atomically(path, json.dumps(json_object(path) | {"init_step": step}, indent=1))


def load_params(workdir: Path, config: configuration.Config, mesh: Mesh) -> Any:
    """The decoder's parameters in the newest whole checkpoint of a run, laid over ``mesh``.

    Of ``config``, which is the folder's own, where they lie and how they are computed with may be
    changed. Raises ``BadInput`` where there is no such checkpoint.
    """
    return load_step(workdir, config, mesh)[1]


def load_step(
    workdir: Path, config: configuration.Config, mesh: Mesh, step: int | None = None
) -> tuple[int, Any]:
    """The step of what ``load_params`` returns, and that; of the ``step`` that a run began from."""
    if not (workdir / "checkpoints").is_dir():
        raise BadInput(f"{workdir}: holds no checkpoint")
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        found = checkpoints.restore_params(abstract_params(config, mesh), step)
    if found is None:
        which = "" if step is None else f" of step {step}, which this run began from,"
        whole = " that is whole" if checkpoints.damaged else ""
        anew = "" if step is None else "; another --workdir begins from what there is"
        raise BadInput(f"{workdir}: holds no checkpoint{which}{whole}{anew}")
    return found


class Checkpoints:
    """The newest training states and some kept for ever, by Orbax: asynchronous, atomic, sharded.

    A state restores onto any mesh: the abstract state says where its arrays shall lie. Each step
    has a ``checksums.json``, and is restored only where its files agree with it; one that doesn't
    is passed over with a line on stderr, and removed when the next state is saved. All processes
    of ``hosts.joined`` call every method alike.

    Reading raises ``BadInput`` where no step has checksums and one is of an older version, which
    wrote none.

    Args:
      workdir: the run's folder.
      kept_step: the step whose state is kept for ever.
      newest: how many of the last states are kept. With one, there is none to fall back on.
      every: states of the multiples of this step are kept for ever, too (0: none).
      period: a state is due at ``kept_step`` and the multiples of this one (0: at none), and the
        newest of those is kept to be rolled back to. Others, of pre-empted runs, come and go.

    ``damaged`` tells the steps that were passed over, and why. Saving, waiting and closing raise
    ``OSError`` naming the folder where the disk is full; finished states are then as they were.
    """

    def __init__(
        self,
        workdir: Path,
        kept_step: int | None = None,
        newest: int = 2,
        every: int = 0,
        period: int = 0,
    ):
        # Here, as it takes a second that a run without checkpoints saves.
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._ocp, self._folder = ocp, (workdir / "checkpoints").absolute()
        self.damaged: dict[int, str] = {}
        self._in_the_way: set[int] = set()  # those of them that are there still
        self._not_good: int | None = None
        self._is_due = lambda at: at == kept_step or bool(period) and at % period == 0
        kept = [policies.LatestN(newest), policies.CustomSteps([kept_step])]
        kept.append(_NewestOf(lambda at: self._is_due(at) and at != self._not_good))
        if every:
            kept.append(policies.EveryNSteps(every))
        logging.getLogger("absl").addFilter(_not_a_traceback_of_orbax)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
                temporary_path_class=_temporary_path(ocp),
                # A step half removed would look damaged, so it is first moved there.
                todelete_subdir=REMOVED,
                # Files that are not a step's would be outside its checksums.
                save_root_metadata=False,
                lightweight_initialize=True,
            ),
            item_handlers={
                # Compression would gain 8 % of the bytes and take more than half of the time.
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, meta: dict, good: bool = True) -> None:
        """Starts writing; arrays are copied before this returns, so they may be donated.

        One that is not (yet) known to be ``good`` takes no other's place to be rolled back to.
        """
        args, self._not_good = self._ocp.args, None if good else step
        composite = args.Composite(state=args.PyTreeSave(state), meta=args.JsonSave(meta))
        with self._full_disk_told():
            self._manager.wait_until_finished()
            self._remove(self._in_the_way.intersection(self._manager.all_steps()))
            self._in_the_way.clear()
            n_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            # Before it is half written, with room for what describes the arrays.
            if shutil.disk_usage(self._folder).free < 1.02 * n_bytes + 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
            self._manager.save(step, args=composite)

    def check(self) -> None:
        """Raises the error of a write that has ended, which would else be told at the next one."""
        if not self._manager.is_saving_in_progress():
            with self._full_disk_told():
                self._manager.wait_until_finished()

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict] | None:
        """(state, meta) of ``step`` (default: the newest), or None where there is none whole.

        ``abstract`` gives shapes, dtypes and shardings.
        """
        found = self._whole(lambda at: step in (None, at))
        return None if found is None else self._read(found, abstract, meta=True)

    def roll_back(self, abstract: Any, before: int) -> tuple[Any, dict] | None:
        """``restore`` of the newest state that was due ``before`` a step; None where there is none.

        States after it are removed. Which one it is does not depend on when the run was
        interrupted.
        """
        step = self._whole(lambda at: at < before and self._is_due(at))
        self._remove([at for at in self._manager.all_steps() if step is None or at > step])
        return None if step is None else self._read(step, abstract, meta=True)

    def restore_params(self, abstract: Any, step: int | None = None) -> tuple[int, Any] | None:
        """(step, parameters alone) of ``restore``'s state, or None where there is none whole."""
        found = self._whole(lambda at: step in (None, at))
        if found is None:
            return None
        return found, self._read(found, {"params": abstract})[0]["params"]

    def close(self) -> None:
        """Waits for writes under way."""
        with self._full_disk_told():
            self._manager.wait_until_finished()
            self._remove(())
            self._manager.close()

    def _remove(self, steps: Iterable[int]) -> None:
        """These, and what Orbax has put aside since the last call. Not while it writes."""
        for step in steps:
            self._manager.delete(step)
        if hosts.is_first():
            shutil.rmtree(self._folder / REMOVED, ignore_errors=True)

    def _whole(self, wanted: Callable[[int], bool]) -> int | None:
        """The newest step that is ``wanted`` and whose files agree with their checksums."""
        with self._full_disk_told():
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())

        def choose() -> list:
            # Passed over, they would all be removed by the next save.
            has_checksums = any(self._folder.glob(f"[0-9]*/{checksums.NAME}"))
            if not has_checksums and any(map(self._is_old, steps)):
                raise BadInput(
                    f"{self._folder}: no checkpoint has its {checksums.NAME}: written by an older"
                    " version; move the folder away to begin anew"
                )
            damaged = {}
            for at in filter(wanted, reversed(steps)):
                reason = checksums.fault(self._folder / str(at))
                if reason is None:
                    return [at, damaged]
                damaged[at] = reason
                told = f"{self._folder / str(at)}: damaged, {reason}; passed over"
                print(f"warning: {told}", file=sys.stderr, flush=True)
            return [None, damaged]

        found, damaged = hosts.agree(choose)
        self.damaged |= {int(at): reason for at, reason in damaged.items()}
        self._in_the_way |= {int(at) for at in damaged}
        return found

    def _is_old(self, step: int) -> bool:
        """Whether a step says that it is of the version that wrote no checksums."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            meta = json.loads((self._folder / str(step) / "meta" / "metadata").read_text())
            return meta.get("schema") == 1
        return False

    def _read(self, step: int, abstract: Any, meta: bool = False) -> tuple[Any, dict | None]:
        args = self._ocp.args
        arrays = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        state = args.PyTreeRestore(abstract, restore_args=arrays, partial_restore=not meta)
        items = {"state": state} | ({"meta": args.JsonRestore()} if meta else {})
        restored = self._manager.restore(step, args=args.Composite(**items))
        return restored.state, restored.meta if meta else None

    @contextlib.contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        """Makes of TensorStore's errors the ``OSError`` that they were. Not while it writes."""
        try:
            yield
        except Exception as error:
            _remove_unfinished(self._folder)  # it takes the space that is missing
            for code in (errno.ENOSPC, errno.EDQUOT):
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code), str(self._folder)) from error
            raise


class _NewestOf:
    """A preservation policy of Orbax: keeps the newest of the steps that are ``wanted``."""

    def __init__(self, wanted: Callable[[int], bool]):
        self._wanted = wanted

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = max((each.step for each in checkpoints if self._wanted(each.step)), default=None)
        return [each.step == newest for each in checkpoints]


def _temporary_path(ocp) -> type:
    class WithChecksums(ocp.path.atomicity.AtomicRenameTemporaryPath):
        """A step's folder while it is written. It gets its checksums before its name."""

        async def finalize(self) -> None:
            if self.get_final().name.isdigit():  # a step's; its items are folders inside
                checksums.write(Path(self.get()))
                os.rename(self.get(), self.get_final())
            else:
                await super().finalize()

    return WithChecksums


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Its errors are raised as well, and end as one line."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def abstract_params(config: configuration.Config, mesh: Mesh) -> Any:
    """The decoder's parameters as shapes and dtypes that lie over ``mesh`` as the config has it."""
    if mesh.shape["stage"] == 1:  # elsewhere the run may have gone round a pipeline
        config = configuration.replace(config, mesh={"rounds": 1})
    decoder = Decoder(config.model, config.data.seq_len)
    inputs = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(decoder.init, jax.random.key(0), inputs)["params"]
    shardings = stored_shardings(boxed, mesh, layout(config, mesh).params)
    return abstract_like(nn.meta.unbox(boxed), shardings)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """``tree``'s shapes and dtypes lying as ``shardings`` say, for ``Checkpoints.restore``."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
