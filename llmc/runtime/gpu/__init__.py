"""Models on devices with memory of their own.

=================  ============================================================================================================
``executor``       what all of them do: weights and pages in the device's memory, steps, graphs of steps, tokens chosen there
``pipeline``       the host some steps ahead of the device
``cudart``         the functions of a driver that this takes, and CUDA's runtime library, which has them
``cuda``           NVIDIA: TVM's CUDA runtime starts the kernels
``metal``          Apple: TVM's Metal runtime holds the memory and starts the kernels
``launch``         devices for which TVM brings no runtime library: llmc starts the kernels that ``device_code`` finds in the module
``hip``            AMD, through HIP
``opencl``         others, through OpenCL
=================  ============================================================================================================
"""
