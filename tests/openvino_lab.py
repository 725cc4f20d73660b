"""An OpenVINO network with every kind of layer that can teach."""

import numpy as np

SIZE = 32, 16


def graph(last="Sigmoid", padding=1, end=None):
    """An openvino.Model with every layer of LAYERS, of a batch of one.

    last: the layer before the last product; end: what is wrong with the output.
    """
    import openvino
    from openvino import opset13 as layers

    generator = np.random.default_rng(0)

    def weights(*shape):
        return generator.normal(size=shape).astype(np.float32)

    image = layers.parameter([1, 3, *SIZE], np.float32)
    x = layers.subtract(layers.gather(image, [2, 1, 0], 1), np.float32([100]))
    x = layers.add(layers.convolution(x, weights(8, 3, 3, 3), [2, 2], [1, 1], [padding, padding], [1, 1]), weights(1, 8, 1, 1))
    x = layers.mvn(x, [2, 3], True, 1e-5, "INSIDE_SQRT")
    x = layers.max_pool(x, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    x = layers.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], True)
    x = layers.group_convolution(x, weights(4, 2, 2, 3, 3), [1, 1], [2, 2], [2, 2], [2, 2])
    x = layers.clamp(layers.relu(x), 0, 6)
    groups = layers.mvn(layers.reshape(x, [0, 2, -1], True), [2], True, 1e-5, "INSIDE_SQRT")
    x = layers.reshape(groups, layers.shape_of(x), False)
    gate = layers.convolution(layers.reduce_mean(x, [2, 3], True), weights(8, 8, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])
    x = layers.multiply(x, layers.sigmoid(gate) if last == "Sigmoid" else layers.softmax(gate, 1))
    x = layers.matmul(layers.reduce_mean(x, [2, 3], False), weights(5, 8), False, True)
    x = layers.prelu(x, weights(5))
    if end == "batch":  # four rows for an image
        x = layers.reshape(layers.matmul(x, weights(20, 5), False, True), [4, 5], False)
    return openvino.Model([x, layers.relu(x)] if end == "outputs" else [x], [image])


def write(path, **options):
    import openvino

    openvino.save_model(graph(**options), path, compress_to_fp16=True)
    return path
