// CUDA kernels of powersgd: products, and Householder's Q. No torch here. Not measured on a GPU.
#pragma once

#include "powersgd/powersgd_cuda_decompress.cuh"
#include "powersgd/powersgd_cuda_householder.cuh"
#include "powersgd/powersgd_cuda_products.cuh"
