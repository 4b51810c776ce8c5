"""How the videos of a run are put into batches: of one size and number of images each."""

from hypothesis import given
from hypothesis import strategies as st

from maxdiffusion.config import Config
from maxdiffusion.request import Job, Segments, Video
from maxdiffusion.variants import get

SHAPES = st.sampled_from([(16, 16, None), (32, 16, None), (16, 32, None), (16, 16, "a.png")])


@given(st.lists(SHAPES, min_size=1, max_size=12), st.integers(1, 5))
def test_every_video_is_in_one_batch_of_its_shape(sizes, limit):
    videos = [Video("", "", seed, width, height, image=image) for seed, (width, height, image) in enumerate(sizes)]
    cfg = Config.model_construct(per_device_batch_size=limit)
    job = Job(cfg, get("wan2.1-t2v"), tuple(videos), Segments(1, 1))
    made, shapes = [], set()
    for rows, count in job.batches(1):
        assert 1 <= count <= len(rows) <= limit
        assert rows[count:] == [rows[count - 1]] * (len(rows) - count)
        (size,) = {sizes[row] for row in rows}
        shapes.add((size, len(rows)))
        made += rows[:count]
    assert sorted(made) == list(range(len(videos)))
    assert len(shapes) == len(set(sizes))  # one program for each shape
    assert [row for row in made if sizes[row] == sizes[0]] == [i for i, size in enumerate(sizes) if size == sizes[0]]
