"""tf.train.Example as protobuf itself writes it, without TensorFlow."""

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def example_class():
    """tf.train.Example, its descriptor built here from tensorflow/core/example/{example,feature}.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=3)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(kinds, start=1):
        key = name.replace("List", "_list").lower()
        feature.field.add(name=key, number=number, type=11, label=1, type_name=f".t.{name}", oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=11, label=1, type_name=".t.Feature")
    features.field.add(name="feature", number=1, type=11, label=3, type_name=".t.Features.FeatureEntry")
    whole = file.message_type.add(name="Example")
    whole.field.add(name="features", number=1, type=11, label=1, type_name=".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = example_class()


def written(**features):
    """The bytes that protobuf makes of {name: list}."""
    message = Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        if len(values) and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif np.asarray(values).dtype.kind == "f":
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(np.asarray(values, np.int64).tolist())
    return message.SerializeToString(deterministic=True)
