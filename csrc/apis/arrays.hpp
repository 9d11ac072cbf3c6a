// Page tables between numpy and C++.
#pragma once

#include <pybind11/numpy.h>

#include <cstring>
#include <vector>

namespace specgen::apis {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T>
std::vector<T> to_vector(const Array<T>& array) {
    return std::vector<T>(array.data(), array.data() + array.size());
}

template <typename T>
pybind11::array_t<T> to_array(const std::vector<T>& values) {
    pybind11::array_t<T> array(pybind11::ssize_t(values.size()));
    if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(T));
    return array;
}

}  // namespace specgen::apis
