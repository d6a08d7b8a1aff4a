"""Find adapter files in a folder or on the Hugging Face hub, and upload them. huggingface_hub is imported on use."""

import os
import tempfile

HUB_OPTIONS = (
    "revision",
    "cache_dir",
    "token",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
    "endpoint",
    "subfolder",
)
OLD_NAMES = {"use_auth_token": "token"}
DROPPED = ("resume_download", "proxies")  # no longer known to huggingface_hub


def split_options(kwargs):
    """(hub options, the rest) of keyword arguments; subfolder counts as an option."""
    kwargs = {OLD_NAMES.get(k, k): v for k, v in kwargs.items()}
    options = {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and k not in DROPPED}
    return options, {k: v for k, v in kwargs.items() if k not in HUB_OPTIONS and k not in DROPPED}


def find_file(model_id, name, subfolder=None, **options):
    """Path of file `name` of a local folder or hub repository, downloaded if need be; None where there is none."""
    folder = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
    if os.path.isdir(model_id):
        from peft.storage.files import settle

        settle(folder)
        path = os.path.join(folder, name)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(os.fspath(model_id), name, subfolder=subfolder or None, **options)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def upload_folder(folder, repo_id, *, private=None, token=None, commit_message=None, create_pr=False, **options):
    """Create the repository if need be and upload a folder; returns the hub's CommitInfo."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload adapter",
        create_pr=create_pr,
        revision=options.get("revision"),
        ignore_patterns=[".peft-*"],
    )


class Pushable:
    """What can be saved with save_pretrained can be uploaded."""

    def push_to_hub(
        self, repo_id, *, commit_message=None, private=None, token=None, revision=None, create_pr=False, **options
    ):
        """Save and upload to a hub repository, which is made if need be; returns the hub's CommitInfo.

        Further options go to save_pretrained.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return upload_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                revision=revision,
            )


def cached_file(model_id, name, revision=None):
    """Path of a file in a local folder or in the hub's cache, never asking the network; None where it is not there."""
    if os.path.isdir(model_id):
        path = os.path.join(model_id, name)
        return path if os.path.isfile(path) else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model_id, name, revision=revision)
    except HFValidationError:
        return None
    return path if isinstance(path, str) else None
