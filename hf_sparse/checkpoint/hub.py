"""Upload checkpoints; if an upload fails the local model stays, and the error names the command to continue with."""

import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, PushToHubMixin

from hf_sparse.checkpoint.card import NO_FIELDS, CardFields, write_card
from hf_sparse.checkpoint.inspection import inspect_checkpoint
from hf_sparse.checkpoint.pages import read_run, ways_to_load
from hf_sparse.checkpoint.save_load import save_pruned
from hf_sparse.errors import SparsityError
from hf_sparse.report.page import PAGE
from hf_sparse.report.report import Report
from hf_sparse.runtime.files import ADAPTER, CHECKPOINT_FILES, write_whole

UPLOADED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "*.html",
    "*.png",
    "modeling_hf_sparse.py",
    "LICENSE*",
    "*.spm",
    "bpe.codes",
    "prophetnet.tokenizer",
)
"""What belongs to the model in its directory; training state, pickles and logs stay at home."""

NOT_UPLOADED = ("trainer_state.json", "sparsity_state.json", "*_results.json")


def push_to_hub(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    processing_class: PushToHubMixin | None = None,
    report: Report | None = None,
    about: CardFields = NO_FIELDS,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pruned model",
) -> CommitInfo:
    """Upload a pruned model, with its card, to a repository, which is created if it does not exist.

    Args:
        model: a compact model, or the directory of one.
        repo_id: such as "me/my-model".
        processing_class: the tokenizer or processor, if a model is given.
        report: of the model's run, if a model is given.
        about: other entries of the card.
        private: whether a new repository is private.
        token: to write with; by default that of `hf auth login`. It is never stored.
        revision: branch to write to.
        commit_message: of the commit.

    Raises:
        SparsityError: the model has gates, or the upload failed; nothing local has changed.
    """
    if isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / repo_id.rpartition("/")[2]
            save_pruned(model, directory, processing_class, report, about)
            again = "save it by save_pruned(model, PATH) and run `hf-sparse push PATH " + repo_id + "`"
            return upload(directory, repo_id, about, private, token, revision, commit_message, again=again)
    return upload(Path(model), repo_id, about, private, token, revision, commit_message)


def upload(
    directory: Path,
    repo_id: str,
    about: CardFields,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pruned model",
    again: str | None = None,
) -> CommitInfo:
    """Upload the checkpoint in a directory, after its card and page got the repository's name; see `push_to_hub`.

    Raises:
        SparsityError: there is no whole checkpoint, or the upload failed.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise SparsityError(f"no checkpoint at {directory}: it has no {CONFIG_NAME}")
    summary = inspect_checkpoint(directory)
    again = again or f"run `{_push_command(directory, repo_id, about, private, revision)}`"
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_card(directory, directory, replace(about, model_id=repo_id))
        if (directory / PAGE).is_file():
            run = replace(read_run(directory), name=repo_id, loading=ways_to_load(summary, repo_id))
            write_whole(directory / PAGE, run.page())
        others = [f"{one.name}/*" for one in directory.iterdir() if one.is_dir() and one.name != ADAPTER]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(UPLOADED),
            ignore_patterns=[*NOT_UPLOADED, *others],
            # Weights of an earlier model would be loaded by this one's config.
            delete_patterns=[*CHECKPOINT_FILES, f"{ADAPTER}/*"],
        )
    except Exception as error:  # a server can fail in any way, and the way out is the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SparsityError(
            f"the upload to {repo_id} failed ({reason}); the model here is whole. To push it again, {again}"
        ) from error


def _push_command(directory: Path, repo_id: str, about: CardFields, private: bool | None, revision: str | None) -> str:
    words = ["hf-sparse", "push", str(directory), repo_id, *(["--private"] if private else [])]
    words += ["--revision", revision] if revision is not None else []
    for name in ("model_name", "language", "license"):
        value = getattr(about, name)
        words += [f"--{name}", value] if value is not None else []
    words += ["--tags", *about.tags] if about.tags else []
    return shlex.join(words)
