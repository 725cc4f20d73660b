"""The losses that `train_step` in train.py adds up."""

import torch.nn.functional as F


def identity_loss(logits, labels, smoothing=0.1):
    """Cross-entropy with label smoothing (Szegedy et al., CVPR 2016), mean over the batch. logits: [N, C]; labels: int64 [N]."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def triplet_loss(features, labels, margin=0.3):
    """Batch-hard triplet loss (Hermans et al., arXiv 1703.07737) of L2-normalised features, mean over the anchors.

    features: [N, D]; labels: int64 [N], at least two identities with at least two images each. For each anchor the hardest
    positive is the furthest image of its identity, the hardest negative the nearest of another one, by Euclidean distance.
    """
    features = F.normalize(features.float())
    squared = (2 - 2 * features @ features.T).clamp(min=1e-8)  # sqrt has no gradient at zero
    same = labels[:, None] == labels[None, :]
    hardest_positive = squared.masked_fill(~same, 0).amax(1).sqrt()
    hardest_negative = squared.masked_fill(same, 4).amin(1).sqrt()
    return F.relu(hardest_positive - hardest_negative + margin).mean()


def distillation_loss(features, logits, teacher_features, teacher_logits, temperature=4.0):
    """Follow a teacher: its class probabilities (Hinton et al., arXiv 1503.02531) and its similarities within the batch.

    features: [N, D]; logits: [N, C]; the teacher's features may have another size. Comparing similarities (Tung and Mori,
    arXiv 1907.09682) rather than features makes that possible.
    """
    soft = F.kl_div(F.log_softmax(logits.float() / temperature, 1), F.softmax(teacher_logits.float() / temperature, 1),
                    reduction="batchmean") * temperature**2
    ours, theirs = F.normalize(features.float()), F.normalize(teacher_features.float())
    return soft + len(ours) * F.mse_loss(ours @ ours.T, theirs @ theirs.T)
