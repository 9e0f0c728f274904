"""Uploads a policy to the Hugging Face hub.

In: the folder of a policy and the name of a repository. Out: its address. The token is that of `hf auth login` or HF_TOKEN.
"""

from pathlib import Path

from cache.checked import CHECKED
from cache.errors import MachineError, UsageError

# Checkpoints are for continuing a run here.
LEFT_OUT = ["checkpoint-*/**", CHECKED]


def check_repository(name: str) -> None:
    """Raise `UsageError` unless `name` can be that of a repository; nothing is asked of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {name}: {error}") from None


def push(folder: Path, name: str) -> str:
    """Upload a folder into the repository, which is made private if it is new; raises `MachineError` if it cannot be."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            ignore_patterns=LEFT_OUT,
            commit_message=f"Upload {folder.name}",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise MachineError(
            f"{folder} could not be uploaded to {name}: {reason}. Log in with `hf auth login`, and type the same command again: "
            f"it trains nothing a second time."
        ) from error
    return str(repository)
