from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadCheckpoint, BadInput

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "genconvit").glob("*.safetensors"))
SLOW = {"genconvit_ed_224"}  # 59 million weights are drawn for it


def micro(**overrides):
    torch.manual_seed(0)
    return create("genconvit_micro", **overrides).eval()


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in RECORDS], ids=[p.stem for p in RECORDS]
)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.mark.slow
def test_published_parameter_counts():
    with torch.device("meta"):
        counts = {name: create(name).parameters_count for name in ("genconvit_ed", "genconvit_vae", "genconvit")}
    assert counts["genconvit_ed"] == 59214875
    latent = 2 * (25088 * 12544 + 12544)  # mu and var
    assert counts["genconvit_vae"] > latent and counts["genconvit_vae"] == 695210767
    assert counts["genconvit"] == counts["genconvit_ed"] + counts["genconvit_vae"]


def test_claim_a_videos_score_is_the_mean_over_frames_and_networks():
    model = micro()
    batch = model.example_batch(2, frames=5)
    with torch.no_grad():
        verdict = model.predict(batch)
        logits = model(model.normalise(batch["frames"][0]))  # frames networks 2
        means = torch.cat([logits[:, 0], logits[:, 1]]).sigmoid().mean(0)  # the 2N rows
        fake = means[0] if means[0] > means[1] else 1 - means[1]
        torch.testing.assert_close(verdict.fake[0], fake)
        for other in (batch["frames"][:, [3, 0, 4, 1, 2]], batch["frames"].repeat(1, 3, 1, 1, 1)):
            torch.testing.assert_close(model.predict({"frames": other}).fake, verdict.fake)


def test_claim_with_an_identity_for_a_decoder_network_a_classifies_x_and_x():
    network = micro(networks="ed").ed
    x = torch.randn(2, 3, 64, 64)
    network.reconstruct = lambda image: image
    with torch.no_grad():
        answer = network.backbone(x)
        expected = network.fc2(F.gelu(network.fc(F.gelu(torch.cat([answer, answer], 1)))))
        torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("embedding", ["released", "fused"])
def test_claim_swin_matters_only_in_the_fused_embedding(embedding):
    model, x = micro(embedding=embedding), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        for name, p in model.named_parameters():
            if ".swin." in name or ".backbone.embed." in name:
                p.add_(0.3)
        assert torch.equal(before, model(x)) == (embedding == "released")


def test_without_noise_network_b_is_deterministic_and_the_deviation_comes_from_mu_as_released():
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(micro(networks="vae")(x), micro(networks="vae")(x))
        model = micro(networks="vae", sample_in_eval=True)
        assert not torch.equal(model(x), model(x))
        mu, variance, eps = torch.randn(3, 2, 64)
        torch.testing.assert_close(micro(deviation="mu").vae.draw(mu, variance, eps), mu + eps * (mu / 2).exp())
        torch.testing.assert_close(micro(deviation="variance").vae.draw(mu, variance, eps), mu + eps * (variance / 2).exp())


def test_the_order_of_the_two_images_differs_between_the_networks():
    model, x = micro(), torch.randn(1, 3, 64, 64)
    seen = []
    for network in (model.ed, model.vae):
        network.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        a, b = model.ed.backbone(x), model.vae.backbone(x)
    torch.testing.assert_close(seen[0][:, 32:], F.gelu(a))  # A: reconstruction, image
    torch.testing.assert_close(seen[1][:, :32], F.relu(b))  # B: image, reconstruction


def test_reconstructions_have_the_images_size_or_half_of_it():
    model, x = micro(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, (_, b, divergence) = model.ed.reconstruct(x), model.vae(x)
    assert a.shape == x.shape and a.min() >= 0 and b.shape == (1, 3, 32, 32) and divergence.shape == (1,)
    with torch.no_grad():
        assert micro(networks="ed")(torch.randn(1, 3, 96, 64)).shape == (1, 1, 2)  # A takes other sizes, B doesn't
    with pytest.raises(BadInput, match="64x64"):
        model(torch.randn(1, 3, 96, 64))


def test_the_losses_are_the_papers():
    model = micro(reconstruction_weight=2.0, divergence_weight=0.5)
    batch = model.example_batch(3, frames=2)
    label = batch["label"].repeat_interleave(2)
    x = model.normalise(batch["frames"].flatten(0, 1))
    with torch.no_grad():
        losses = model.vae_loss(batch)
        logits, reconstruction, _ = model.vae(x)
        mu, variance = model.vae.encode(x)
        kl = 0.5 * (-0.5 * (1 + variance - mu**2 - variance.exp()).sum(1)).mean()
        error = (F.interpolate(reconstruction, size=(64, 64), mode="bilinear") - x).square().mean()
        expected = F.cross_entropy(logits, label) + 2 * error + 0.5 * kl
        torch.testing.assert_close(losses.total, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.loss(batch).total, model.ed_loss(batch).total + losses.total)
        assert set(model.ed_loss(batch).terms) == {"ed_cross_entropy"}


def test_the_networks_are_trained_one_after_the_other():
    both = micro().training_stages()
    assert [(s.turns[0].loss, s.turns[0].train) for s in both] == [("ed_loss", ("ed.*",)), ("vae_loss", ("vae.*",))]
    assert [s.turns[0].loss for s in micro(networks="vae").training_stages()] == ["vae_loss"]


def test_released_files_are_one_a_network_and_hold_swin_twice():
    both = micro()
    names = authors_of("genconvit").export_state(both)
    assert "model_ed.embedder.patch_embed.proj.weight" in names and "model_vae.convnext_backbone.patch_embed.proj.weight" in names
    alone = micro(networks="ed")
    with torch.no_grad():
        for p in alone.parameters():
            p.add_(0.1)
    file = authors_of("genconvit").export_state(alone)
    assert torch.equal(file["embedder.head.fc.bias"], file["backbone.patch_embed.backbone.head.fc.bias"])
    load_state(both, file, skip=("vae.*",))
    assert all(torch.equal(p, both.state_dict()[k]) for k, p in alone.state_dict().items())
    with pytest.raises(BadCheckpoint):
        load_state(both, file)  # without saying that the other network's are elsewhere


def test_checkpoints_of_older_timm_have_swins_merging_at_a_layers_end():
    model = micro(networks="ed")
    new = authors_of("genconvit").export_state(model)
    old = {k.replace("layers.1.downsample", "layers.0.downsample").replace("backbone.head.fc", "backbone.head"): v for k, v in new.items()}
    old = {k: v for k, v in old.items() if not k.startswith(("embedder.", "backbone.head."))}
    old |= {k: v for k, v in new.items() if k.startswith("backbone.head.")}
    old["backbone.patch_embed.backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(2, 2)
    other = micro(networks="ed")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    load_state(other, old)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"networks": "c"}, {"embedding": "fused", "embed_dim": 7}, {"deviation": "sigma"}, {"image_size": 50}):
        with pytest.raises(BadInput):
            micro(**wrong)


def test_it_learns_to_tell_smoothed_patches_in_a_few_steps():
    torch.manual_seed(0)
    model = create("genconvit_micro", networks="ed").train()
    frames = torch.rand(12, 1, 3, 64, 64)
    label = torch.arange(12) % 2
    frames[label == 0, :, :, 16:48, 16:48] = 0.5
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(12):
        loss = model.ed_loss({"frames": frames, "label": label}).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.4
