import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from rwkv_train.checkpoints.hub import resolve_path
from rwkv_train.errors import CheckpointError


def test_a_file_of_the_hub_is_asked_for_by_owner_name_and_path(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_path("hf:BlinkDL/rwkv-7-world/models/x.pth") == tmp_path / "cached"
    assert asked == [("BlinkDL/rwkv-7-world", "models/x.pth")]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find it in the local cache. Please check your connection."),
        EntryNotFoundError("404 Client Error."),
        HFValidationError("Repo id must be in the form 'namespace/repo_name'"),
        ConnectionError("offline mode is enabled"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_that_cannot_be_had_is_one_sentence_with_the_fix(monkeypatch, error):
    def fail(repo_id, filename):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        CheckpointError, match=r"^hf:a/b/c.pth cannot be had .*or download the file"
    ) as caught:
        resolve_path("hf:a/b/c.pth")
    assert ". " not in str(caught.value)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a" * 300], ids=["home", "long"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(CheckpointError, match="is not a path"):
        resolve_path(path)


@pytest.mark.parametrize("path", ["hf:", "hf:owner", "hf:owner/name", "hf:owner/name/", "hf:/name/file"])
def test_an_incomplete_name_is_refused(path):
    with pytest.raises(CheckpointError, match=r"hf:OWNER/NAME/FILE"):
        resolve_path(path)
