"""What training minimises: `identity + pairs (+ distillation)`. Change the loss here."""

import torch
import torch.nn.functional as F


def identity_loss(logits, labels, smoothing=0.1):
    """Cross-entropy with label smoothing (Szegedy et al., CVPR 2016), mean over the batch. logits [N, C], labels [N]."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def triplet_loss(features, labels, margin=0.3):
    """Batch-hard triplet loss (Hermans et al., arXiv 1703.07737) on L2-normalised features, mean over the anchors.

    features: [N, D], labels: int64 [N], every identity at least twice and at least two identities. The hardest positive
    and negative of each anchor are the furthest of its own and the nearest of the others by Euclidean distance.
    """
    features = F.normalize(features.float())
    squared = (2 - 2 * features @ features.T).clamp(min=1e-8)  # sqrt has no gradient at zero
    same = labels[:, None] == labels[None, :]
    hardest_positive = squared.masked_fill(~same, 0).amax(1).sqrt()
    hardest_negative = squared.masked_fill(same, 4).amin(1).sqrt()
    return F.relu(hardest_positive - hardest_negative + margin).mean()


def circle_loss(features, labels, margin=0.25, scale=64.0):
    """Circle loss over all pairs of the batch (Sun et al., arXiv 2002.10857, eq. 6 for each anchor), mean over the anchors.

    features, labels: as for `triplet_loss`. Similarities are pulled towards 1 within an identity and 0 between identities, the
    more the further they are from there; the weights carry no gradient.
    """
    features = F.normalize(features.float())
    similar = features @ features.T
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    pull = F.relu(1 + margin - similar).detach() * (1 - margin - similar)
    push = F.relu(similar + margin).detach() * (similar - margin)
    pull = (scale * pull).masked_fill(~same | itself, -torch.inf).logsumexp(1)
    push = (scale * push).masked_fill(same, -torch.inf).logsumexp(1)
    return F.softplus(pull + push).mean()


PAIR_LOSSES = {"triplet": triplet_loss, "circle": circle_loss}


def distillation_loss(features, logits, teacher_features, teacher_logits, temperature=4.0):
    """Follow a teacher: its class probabilities (Hinton et al., arXiv 1503.02531) and its similarities within the batch
    (Tung and Mori, arXiv 1907.09682), so that embeddings of another size can teach. The teacher's tensors carry no gradient."""
    soft = F.kl_div(F.log_softmax(logits.float() / temperature, 1), F.softmax(teacher_logits.float() / temperature, 1),
                    reduction="batchmean") * temperature**2
    ours, theirs = F.normalize(features.float()), F.normalize(teacher_features.float())
    return soft + len(ours) * F.mse_loss(ours @ ours.T, theirs @ theirs.T)
