import pytest
import torch

from formarium.nn.views import View, colour_jitter, gaussian_blur, grey, random_resized_crop, solarise, turn_hue

IMAGE = torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def seed(n=0):
    return torch.Generator().manual_seed(n)


def test_a_whole_crop_is_the_image_and_its_mirror():
    square = IMAGE[..., :24]
    torch.testing.assert_close(random_resized_crop(square, (1, 1), (1, 1), flip=0), square, atol=1e-5, rtol=0)
    torch.testing.assert_close(random_resized_crop(square, (1, 1), (1, 1), flip=1.1), square.flip(3), atol=1e-5, rtol=0)


def test_crops_stay_inside():
    ramp = torch.linspace(0.2, 0.8, 32).expand(50, 1, 32, 32)
    out = random_resized_crop(ramp, (0.2, 0.5), flip=0.5, generator=seed())
    assert out.min() >= 0.199 and out.max() <= 0.801
    assert 0.2 < (out.amax((1, 2, 3)) - out.amin((1, 2, 3))).mean() / 0.6 < 0.85


def test_colours():
    assert torch.equal(colour_jitter(IMAGE, (0.4, 0.4, 0.2, 0.1), 0.0), IMAGE)
    torch.testing.assert_close(colour_jitter(IMAGE, (0, 0, 0, 0), 1.1), IMAGE)
    torch.testing.assert_close(turn_hue(IMAGE, torch.zeros(4)), IMAGE, atol=1e-4, rtol=0)
    torch.testing.assert_close(turn_hue(IMAGE, torch.full((4,), 1.0)), IMAGE, atol=1e-3, rtol=0)
    torch.testing.assert_close(grey(turn_hue(IMAGE, torch.full((4,), 0.3))), grey(IMAGE), atol=1e-3, rtol=0)


def test_blur_keeps_the_mean_of_a_plain_image_and_smooths():
    plain = torch.full((2, 3, 16, 16), 0.4)
    torch.testing.assert_close(gaussian_blur(plain, (0.5, 2.0), 1.1), plain)
    assert gaussian_blur(IMAGE, (1.0, 2.0), 1.1).std() < 0.6 * IMAGE.std()
    assert torch.equal(gaussian_blur(IMAGE, (1.0, 2.0), 0.0), IMAGE)


def test_solarising_turns_the_bright_half_over():
    out = solarise(IMAGE, 1.1)
    assert out.max() <= 0.5 and torch.equal(out[IMAGE < 0.5], IMAGE[IMAGE < 0.5])


@pytest.mark.parametrize("view", [View(), View(solarise_probability=0.2, blur_probability=0.1)])
def test_views_depend_on_their_generator_alone(view):
    one, same, other = (view(IMAGE, seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == IMAGE.shape and one.min() >= -1e-5 and one.max() <= 1 + 1e-5
