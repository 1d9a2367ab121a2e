// SPDX-License-Identifier: GPL-2.0
/* Adds a device dump to /proc/vmcore when told to (include/linux/crash_dump.h: vmcore_add_device_dump()):
 * echo SIZE > /sys/module/ddump/parameters/add. Each of its bytes has the value of the one before and one more. */
#include <linux/crash_dump.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/string.h>

static int fill(struct vmcoredd_data *data, void *buffer)
{
	unsigned int i;

	for (i = 0; i < data->size; i++)
		((unsigned char *)buffer)[i] = i;
	return 0;
}

static int add(const char *value, const struct kernel_param *parameter)
{
	struct vmcoredd_data data = { .vmcoredd_callback = fill };
	int error = kstrtouint(value, 0, &data.size);

	if (error)
		return error;
	strscpy(data.dump_name, "ddump", sizeof(data.dump_name));
	return vmcore_add_device_dump(&data);
}

static const struct kernel_param_ops operations = { .set = add };
module_param_cb(add, &operations, NULL, 0200);
MODULE_DESCRIPTION("test of device dumps in /proc/vmcore");
MODULE_LICENSE("GPL");
