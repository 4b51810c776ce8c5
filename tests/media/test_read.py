import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import read_video


@pytest.mark.parametrize(
    ("name", "words"), [("missing.mp4", "does not exist"), ("text.mp4", "not a video"), ("", "without PNG")]
)
def test_what_is_no_video_is_one_sentence(tmp_path, name, words):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=words):
        read_video(tmp_path / name)
