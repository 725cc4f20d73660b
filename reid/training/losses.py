"""The losses that `train_step` in train.py adds up."""

import torch.nn.functional as F


def identity_loss(logits, labels, smoothing=0.1):
    """Return the cross-entropy with label smoothing (Szegedy et al., CVPR 2016), mean over the batch.

    logits: [N, C]; labels: int64 [N].
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def triplet_loss(features, labels, margin=0.3):
    """Return the batch-hard triplet loss (Hermans et al., arXiv 1703.07737) of L2-normalised features, mean over the anchors.

    features: [N, D]; labels: int64 [N], at least two identities with at least two images each. For each anchor the hardest
    positive is the furthest image of its identity, the hardest negative the nearest of another one, by Euclidean distance.
    """
    features = F.normalize(features.float())
    squared = (2 - 2 * features @ features.T).clamp(min=1e-8)  # sqrt has no gradient at zero
    same = labels[:, None] == labels[None, :]
    hardest_positive = squared.masked_fill(~same, 0).amax(1).sqrt()
    hardest_negative = squared.masked_fill(same, 4).amin(1).sqrt()
    return F.relu(hardest_positive - hardest_negative + margin).mean()


def relational_loss(embeddings, targets):
    """Compare similarities within the batch with a teacher's (similarity-preserving distillation; Tung and Mori, ICCV 2019).

    embeddings: [N, D]; targets: [N, T], the teacher's, of any dimension. N times the mean squared error of the two [N, N]
    matrices of cosine similarities; the factor N keeps the weight of an image the same in batches of any size.
    """
    ours, theirs = F.normalize(embeddings.float()), F.normalize(targets.float())
    return len(ours) * F.mse_loss(ours @ ours.T, theirs @ theirs.T)


def cosine_loss(mapped, targets):
    """Return 1 - cosine similarity with a teacher's embeddings, mean over the batch. mapped, targets: [N, T].

    mapped: a linear map of the embeddings to the teacher's space, which learns as well (a regressor as of FitNets; Romero et al.,
    ICLR 2015).
    """
    return 1 - F.cosine_similarity(mapped.float(), targets.float()).mean()


def soft_label_loss(logits, teacher_logits, temperature=4.0):
    """Follow a teacher's class probabilities (Hinton et al., arXiv 1503.02531). logits, teacher_logits: [N, C].

    KL divergence of the probabilities at `temperature`, mean over the batch, times its square: so the gradient keeps its scale.
    """
    ours, theirs = (F.log_softmax(values.float() / temperature, 1) for values in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
