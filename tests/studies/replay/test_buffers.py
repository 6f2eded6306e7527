import numpy as np
from PIL import Image

import kdc
from studies.replay import buffers
from studies.replay.study import stem_of


def test_less_precision_loses_more_and_full_precision_nothing(teacher):
    data = kdc.cache_latents(teacher, kdc.load_dataset("flora", "test", count=6))
    found = buffers.decoded_loss(teacher, data, count=4)
    assert found["float32"] == float("inf") or found["float32"] > 100
    assert found["float16"] > found["int8"] > 30
    coarse = kdc.LatentDataset(**vars(data) | {"mean": data.mean * 1.0})
    coarse.mean[:, 0, 0, 0] = 1000  # one outlier makes every step of its channel coarse
    assert buffers.decoded_loss(teacher, coarse, count=4)["int8"] < found["int8"]


def test_images_after_each_task_are_read_by_trial_and_task(tmp_path):
    sheet = np.zeros((2 * 4, 3 * 4, 3), dtype=np.uint8)
    sheet[4:, 8:] = 200  # the third prompt after the second task
    file = stem_of(tmp_path, "here", "as given", "replay", 0).with_suffix(".png")
    Image.fromarray(sheet).save(file)
    rows = buffers.generated_after(tmp_path, "here", "as given", 0, ["a", "b"], ["replay"], 3)
    assert list(rows) == ["replay, after a", "replay, after b"]
    means = [[image.mean() for image in row] for row in rows.values()]
    assert means == [[0, 0, 0], [0, 0, 200]] and rows["replay, after a"][0].shape == (3, 4, 4)
